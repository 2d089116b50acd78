// The index that is served with the runs: pictures for a text, or texts for the picture.

import { ask } from "./api.js";
import { bars, field, make } from "./dom.js";
import { shown } from "./picture.js";
import { Result } from "./result.js";

const FOUND = 8;

export function searchPanel(page) {
  const { kind, count } = page.info.index;
  return kind === "image" ? picturesForText(page, count) : textsForPicture(page, count);
}

function picturesForText(page, count) {
  const result = new Result("What is nearest comes here.");
  const [labelled, input] = field("Text", make("input", { type: "search", autocomplete: "off" }));
  const element = make("div", {},
    make("p", { class: "lead", text: `Search ${count} pictures by a text.` }),
    make("form", { class: "ask", role: "search", on: { submit: (event) => { event.preventDefault(); send(); } } },
      labelled, make("button", { type: "submit", class: "primary", text: "Search" })),
    result.element);

  function send() {
    const text = input.value.trim();
    if (!text) return result.clear("Write something first.");
    return result.show(async (signal) => {
      const { found } = await ask("search", { text, top: FOUND }, signal);
      const cards = found.map((one) => make("li", {},
        one.url ? shown(make("img", { src: one.url, alt: one.id })) : "",
        make("span", { class: "name", text: one.id }),
        make("span", { class: "hush", text: `cosine ${one.similarity.toFixed(3)}` })));
      return [[make("ol", { class: "found", "aria-label": "Pictures, the nearest first" }, ...cards)],
        `${found.length} pictures, the nearest is ${found[0].id}.`];
    });
  }

  return {
    element,
    update() {
      if (!input.value) input.value = page.given.caption;
    },
  };
}

function textsForPicture(page, count) {
  const result = new Result("Choose a picture first, or one of the examples.");
  const element = make("div", {},
    make("p", { class: "lead", text: `Which of ${count} texts are nearest to the picture?` }), result.element);
  return {
    element,
    update() {
      const { picture } = page.given;
      if (!picture) return result.clear();
      return result.show(async (signal) => {
        const { found } = await ask("search", { image: picture.url, top: FOUND }, signal);
        const rows = found.map((one) => ({ name: one.id, share: (one.similarity + 1) / 2, said: `cosine ${one.similarity.toFixed(3)}` }));
        return [[bars(rows, "Texts, the nearest first")], `The nearest: ${found[0].id}.`];
      });
    },
  };
}
