// The words of a caption: to be hidden, or to be chosen.

import { arrowKeys, make } from "./dom.js";

export const MASK = "[MASK]";
// A [MASK] that was typed, a word, or one other sign.
const PARTS = /\[MASK\]|[\p{L}\p{N}]+(?:['’-][\p{L}\p{N}]+)*|[^\s\p{L}\p{N}]/gu;

/** [{text, space, word}]: the parts of a text, with the white space that stands before each. */
export function parts(text) {
  let end = 0;
  return [...text.matchAll(PARTS)].map((found) => {
    const space = text.slice(end, found.index) ? " " : "";
    end = found.index + found[0].length;
    return { text: found[0], space, word: /[\p{L}\p{N}]/u.test(found[0]) };
  });
}

/** How a piece of the vocabulary reads: without the marks of SentencePiece and WordPiece. */
export function readable(piece) {
  return piece.replace(/^(\u2581|##)/u, "");
}

/** Words that are hidden and shown by a click. */
export class HideableWords {
  constructor(changed) {
    this.changed = changed;
    this.element = make("div", { class: "chips", role: "group", "aria-label": "Words of the caption. Press one to hide it." });
    this.set("");
  }

  set(text) {
    this.parts = parts(text);
    this.hidden = new Set(this.parts.flatMap((part, i) => (part.text === MASK ? [i] : [])));
    this.element.replaceChildren(
      ...this.parts.map((part, i) => {
        if (!part.word) return make("span", { class: "sign", text: part.text });
        if (part.text === MASK) return make("span", { class: "chip hidden", text: MASK });
        return make("button", { type: "button", class: "chip", "aria-pressed": "false", text: part.text,
          on: { click: (event) => this.#toggle(i, event.currentTarget) } });
      }),
    );
  }

  /** The whole caption; null if a [MASK] was typed into it, or if there is none. */
  whole() {
    const typed = this.parts.some((part) => part.text === MASK);
    return typed || this.parts.length === 0 ? null : this.parts.map((p) => p.space + p.text).join("").trim();
  }

  /** The caption with [MASK] in place of what is hidden. */
  masked() {
    return this.parts.map((p, i) => p.space + (this.hidden.has(i) ? MASK : p.text)).join("").trim();
  }

  /** The hidden words in their order; null for a [MASK] that was typed. */
  truths() {
    return [...this.hidden].sort((a, b) => a - b)
      .map((i) => (this.parts[i].text === MASK ? null : this.parts[i].text));
  }

  #toggle(number, chip) {
    const hide = !this.hidden.has(number);
    if (hide) this.hidden.add(number);
    else this.hidden.delete(number);
    chip.setAttribute("aria-pressed", String(hide));
    this.changed();
  }
}

/** Pieces of which one is chosen. */
export class WordChoice {
  /** @param {(number: number) => void} chosen */
  constructor(chosen) {
    this.chosen = chosen;
    this.number = 0;
    this.element = make("div", { class: "chips", role: "radiogroup", "aria-label": "Word" });
    arrowKeys(this.element, () => [...this.element.children], () => 0, (chip) => chip.click());
  }

  set(pieces, number) {
    this.element.replaceChildren(
      ...pieces.map((piece, i) =>
        make("button", { type: "button", class: "chip", role: "radio", text: readable(piece),
          on: { click: () => this.choose(i) } })));
    this.choose(Math.min(number, pieces.length - 1));
  }

  choose(number) {
    this.number = number;
    [...this.element.children].forEach((chip, i) => {
      chip.setAttribute("aria-checked", String(i === number));
      chip.tabIndex = i === number ? 0 : -1;
    });
    this.chosen(number);
  }
}
