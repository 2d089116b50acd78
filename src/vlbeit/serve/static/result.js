// A place for answers with its four states: a hint, waiting, an answer, an error.

import { ApiError, Latest } from "./api.js";
import { make } from "./dom.js";

export class Result {
  #latest = new Latest();

  /** @param {string} hint what to do to see something here */
  constructor(hint) {
    this.hint = hint;
    this.body = make("div", { class: "answer" });
    this.said = make("p", { class: "unseen", role: "status" });
    this.element = make("div", { class: "result" }, this.body, this.said);
    this.clear();
  }

  clear(hint = this.hint) {
    this.#latest.stop();
    this.element.removeAttribute("aria-busy");
    this.body.replaceChildren(make("p", { class: "hint", text: hint }));
    this.said.textContent = "";
  }

  /**
   * Shows what `act(signal)` gives: [nodes, a sentence for those who do not see them].
   * An earlier one that still waits is dropped.
   */
  async show(act) {
    this.element.setAttribute("aria-busy", "true");
    try {
      const found = await this.#latest.run(act);
      if (found === undefined) return;
      const [nodes, sentence] = found;
      this.body.replaceChildren(...nodes);
      this.said.textContent = sentence;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.body.replaceChildren(make("p", { class: "notice bad", role: "alert", text: error.message }));
      this.said.textContent = "";
    }
    this.element.removeAttribute("aria-busy");
  }
}
