// Sentences about pictures: a question, a claim, captions, a statement about two; and the class.

import { ask } from "./api.js";
import { bars, field, make, percent } from "./dom.js";
import { PictureChooser } from "./picture.js";
import { Result } from "./result.js";

const LIKELY = (answers) => answers.map((a) => ({ name: a.name, share: a.probability }));

/** A form of one input that asks when it is sent; `act(picture, text, signal)` answers. */
function form(page, { lead, label, button, input, hint, act, extra = [] }) {
  const result = new Result(hint);
  const [labelled] = field(label, input);
  const element = make("div", {},
    make("p", { class: "lead", text: lead }),
    ...extra,
    make("form", { class: "ask", on: { submit: (event) => { event.preventDefault(); send(); } } },
      labelled, make("button", { type: "submit", class: "primary", text: button })),
    result.element);

  function send() {
    const { picture } = page.given;
    if (!picture) return result.clear("Choose a picture first, or one of the examples.");
    const text = input.value.trim();
    if (!text) return result.clear("Write something first.");
    return result.show((signal) => act(picture, text, signal));
  }

  return { element, result, send };
}

export function answerPanel(page) {
  const input = make("input", { type: "text", autocomplete: "off", placeholder: "what colour is the ring" });
  const { element, result } = form(page, {
    lead: "Ask a question about the picture.",
    label: "Question", button: "Ask", input, hint: "The likeliest answers come here.",
    act: async (picture, question, signal) => {
      const { answers } = await ask("answer", { image: picture.url, question, top: 5 }, signal);
      return [[make("p", { class: "verdict", text: answers[0].name }), bars(LIKELY(answers), "Answers")],
        `${answers[0].name}, ${percent(answers[0].probability)}.`];
    },
  });
  return {
    element,
    update() {
      const question = page.given.picture?.example?.question;
      if (question) input.value = question;
      result.clear();
    },
  };
}

export function entailPanel(page) {
  const input = make("input", { type: "text", autocomplete: "off", placeholder: "somebody is outside" });
  const { element, result } = form(page, {
    lead: "Does the picture entail a sentence, contradict it, or leave it open?",
    label: "Sentence", button: "Judge", input, hint: "The three possibilities come here.",
    act: async (picture, sentence, signal) => {
      const found = await ask("entail", { image: picture.url, sentence }, signal);
      const rows = Object.entries(found).map(([name, share]) => ({ name, share })).sort((a, b) => b.share - a.share);
      return [[make("p", { class: "verdict", text: rows[0].name }), bars(rows, "Relations")],
        `${rows[0].name}, ${percent(rows[0].share)}.`];
    },
  });
  return { element, update: () => result.clear() };
}

export function matchPanel(page) {
  const input = make("textarea", { rows: 4, spellcheck: "false" });
  const { element, result } = form(page, {
    lead: "Which of these captions belongs to the picture? One a line.",
    label: "Captions", button: "Match", input, hint: "The captions come here, the best one first.",
    act: async (picture, text, signal) => {
      const captions = [...new Set(text.split("\n").map((line) => line.trim()).filter(Boolean))];
      const found = await Promise.all(captions.map((text) => ask("match", { image: picture.url, text }, signal)));
      const rows = captions.map((name, i) => {
        const { similarity, probability } = found[i];
        const cosine = `cosine ${similarity.toFixed(3)}`;
        return probability === null
          ? { name, share: (similarity + 1) / 2, order: similarity, said: cosine }
          : { name, share: probability, order: probability, said: `${percent(probability)} · ${cosine}` };
      }).sort((a, b) => b.order - a.order);
      return [[bars(rows, "Captions by how well they match")], `Best: ${rows[0].name}.`];
    },
  });
  return {
    element,
    update() {
      const others = page.examples.map((example) => example.text).filter((text) => text !== page.given.caption);
      input.value = [page.given.caption, ...others.slice(0, 3)].filter(Boolean).join("\n");
      result.clear();
    },
  };
}

export function comparePanel(page) {
  const input = make("input", { type: "text", autocomplete: "off", placeholder: "both pictures show a star" });
  const right = new PictureChooser("Right picture", page.examples, page.fileLimit, () => result.clear());
  const { element, result } = form(page, {
    lead: "Is a statement about two pictures true? The left one is the picture beside this panel.",
    label: "Statement", button: "Decide", input, hint: "True or false comes here.",
    extra: [make("div", { class: "second" }, make("h3", { text: "Right picture" }), right.element)],
    act: async (picture, statement, signal) => {
      if (!right.picture) return [[make("p", { class: "hint", text: "Choose the right picture too." })], "Choose the right picture too."];
      const found = await ask("compare", { left: picture.url, right: right.picture.url, statement }, signal);
      const rows = [{ name: "true", share: found.probability }, { name: "false", share: 1 - found.probability }];
      rows.sort((a, b) => b.share - a.share);
      return [[make("p", { class: "verdict", text: found.true ? "true" : "false" }), bars(rows, "Verdict")],
        `${found.true ? "True" : "False"}: ${percent(rows[0].share)}.`];
    },
  });
  return { element, update: () => result.clear() };
}

export function classifyPanel(page) {
  const result = new Result("Choose a picture first, or one of the examples.");
  const element = make("div", {}, make("p", { class: "lead", text: "What kind of picture is it?" }), result.element);
  return {
    element,
    update() {
      const { picture } = page.given;
      if (!picture) return result.clear();
      return result.show(async (signal) => {
        const { answers } = await ask("classify", { image: picture.url, top: 5 }, signal);
        return [[make("p", { class: "verdict", text: answers[0].name }), bars(LIKELY(answers), "Classes")],
          `${answers[0].name}, ${percent(answers[0].probability)}.`];
      });
    },
  };
}
