// Hide words and patches; what the model puts there, with and without the other modality.

import { ask, pngUrl } from "./api.js";
import { bars, counted, make, percent, settled } from "./dom.js";
import { PatchGrid, covered } from "./patch_grid.js";
import { shown } from "./picture.js";
import { Result } from "./result.js";
import { HideableWords, readable } from "./words.js";

const ASKED = 50; // candidates asked for, so that the probability of the hidden word is likely among them
const SHOWN = 5;
const QUIET = 250; // milliseconds without a change before the model is asked

/** @param {{info: Object, given: {picture: ?Object, caption: string}}} page */
export function fillPanel(page) {
  const hasPatches = page.info.modes.fill_patches.available;
  const grid = page.gridOf("fill_patches") ?? page.gridOf("fill_words");
  const words = new HideableWords(() => later());
  const patches = new PatchGrid(() => later());
  const wordResult = new Result("Press a word of the caption to hide it.");
  const patchResult = new Result("Paint over the picture to hide patches of it.");
  const told = make("p", { class: "hush", "aria-live": "polite" });
  const tools = make("div", { class: "tools" },
    make("button", { type: "button", text: "Hide 40 % at random", on: { click: () => patches.hideBlock(0.4) } }),
    make("button", { type: "button", text: "Show everything", on: { click: () => { reset(); later(); } } }));
  const empty = make("p", { class: "hint", text: "Choose a picture first, or one of the examples." });
  const stage = make("div", { class: "stage-side" }, patches.element, ...(hasPatches ? [tools] : []));

  const element = make("div", {},
    make("p", { class: "lead", text: "Hide words or patches. The model saw nothing but such gaps while it learned." }),
    make("div", { class: "split" },
      make("div", {}, empty, stage),
      make("div", {}, make("h3", { text: "Words" }), words.element, told, wordResult.element)),
    ...(hasPatches ? [make("h3", { text: "Patches" }), patchResult.element] : []));

  function reset() {
    words.set(page.given.caption);
    patches.hide([]);
  }

  const later = settled(() => {
    tell();
    fillWords();
    if (hasPatches) fillPatches();
  }, QUIET);

  function tell() {
    told.textContent = `${counted(words.hidden.size, "word", "words")} and ` +
      `${counted(patches.hidden.size, "patch", "patches")} hidden.`;
  }

  function fillWords() {
    if (!words.hidden.size) return wordResult.clear();
    const [text, truths, picture] = [words.masked(), words.truths(), page.given.picture];
    return wordResult.show(async (signal) => {
      const [withPicture, alone] = await Promise.all([
        picture && ask("fill_words", { text, image: picture.url, top: ASKED }, signal),
        ask("fill_words", { text, top: ASKED }, signal),
      ]);
      const nodes = truths.map((truth, i) => wordCard(truth, withPicture?.guesses[i], alone.guesses[i]));
      const best = (withPicture ?? alone).guesses.map(([first]) => readable(first.piece)).join(", ");
      return [nodes, `Filled in: ${best}.`];
    });
  }

  function fillPatches() {
    const [hidden, picture, text] = [patches.numbers(), page.given.picture, words.whole()];
    if (!hidden.length || !picture) return patchResult.clear();
    return patchResult.show(async (signal) => {
      const fields = { image: picture.url, hidden };
      const [withText, alone] = await Promise.all([
        text && ask("fill_patches", { ...fields, text }, signal),
        ask("fill_patches", fields, signal),
      ]);
      const ratio = picture.width / picture.height;
      const seen = await covered(picture.url, grid, hidden, getComputedStyle(element).getPropertyValue("--gap"));
      const drawn = [
        figure(seen, "Hidden", counted(hidden.length, "patch", "patches"), ratio),
        ...(withText ? [figure(drawing(withText.picture, "Filled in with the caption"), "With the caption", scores(withText), ratio)] : []),
        figure(drawing(alone.picture, "Filled in without the caption"), "From the picture alone", scores(alone), ratio),
        figure(drawing(alone.codes_picture, "All patches as the tokenizer's own codes"), "Tokenizer’s own", "as well as codes can show it", ratio),
      ];
      const note = text === null
        ? "Write a caption without [MASK] to see what it adds."
        : "The caption is read whole here, the picture whole for hidden words: one side is hidden at a time, as in pretraining.";
      const best = withText ?? alone;
      return [
        [make("div", { class: "figures" }, ...drawn), make("p", { class: "hush", text: note })],
        `${best.right} of ${hidden.length} hidden codes are right${withText ? ` with the caption, ${alone.right} without it` : ""}.`,
      ];
    });
  }

  reset();
  stage.hidden = true;
  return {
    element,
    update() {
      const { picture } = page.given;
      empty.hidden = picture !== null;
      stage.hidden = picture === null;
      if (picture) patches.set(picture.url, picture.name, grid);
      reset();
      later();
    },
  };
}

function wordCard(truth, withPicture, alone) {
  const same = (guess) => truth !== null && readable(guess.piece).toLowerCase() === truth.toLowerCase();
  const list = (guesses, label) =>
    bars(guesses.slice(0, SHOWN).map((g) => ({ name: readable(g.piece), share: g.probability, right: same(g) })), label);
  const share = (guesses) => guesses.find(same)?.probability;
  const said = (value, guesses) => (value === undefined ? `less than ${percent(guesses.at(-1).probability)}` : percent(value));
  const title = truth === null ? "A typed gap" : `“${truth}”`;
  const columns = [["Text alone", alone]];
  if (withPicture) columns.unshift(["With the picture", withPicture]);
  const adds = withPicture && truth !== null
    ? [make("p", { class: "adds" }, "Probability of ", make("b", { text: truth }), ": ",
        make("b", { text: said(share(withPicture), withPicture) }), " with the picture, ",
        make("b", { text: said(share(alone), alone) }), " from the text alone.")]
    : [];
  return make("article", { class: "word-card", "aria-label": `Hidden word ${title}` },
    make("h4", { text: title }),
    make("div", { class: "columns" },
      ...columns.map(([name, guesses]) =>
        make("div", {}, make("p", { class: "column-title", text: name }), list(guesses, `${title}: ${name}`)))),
    ...adds);
}

function drawing(base64, alt) {
  return shown(make("img", { src: pngUrl(base64), alt }));
}

function figure(picture, title, said, ratio) {
  picture.style.setProperty("--ratio", ratio);
  return make("figure", {}, picture, make("figcaption", {}, make("b", { text: title }), make("span", { class: "hush", text: said })));
}

function scores(found) {
  const hidden = found.hidden.map((number) => found.probabilities[number]);
  const mean = hidden.reduce((sum, one) => sum + one, 0) / hidden.length;
  return `${found.right} of ${found.hidden.length} codes right, ${percent(mean)} sure`;
}
