// Maps over the picture: the class of every pixel, and where a word's attention goes.

import { ask, pngUrl } from "./api.js";
import { field, make, percent } from "./dom.js";
import { shown } from "./picture.js";
import { Result } from "./result.js";
import { WordChoice, readable } from "./words.js";

const NO_PICTURE = "Choose a picture first, or one of the examples.";

export function segmentPanel(page) {
  const result = new Result(NO_PICTURE);
  const element = make("div", {},
    make("p", { class: "lead", text: "The class of every pixel, laid over the picture." }), result.element);
  return {
    element,
    update() {
      const { picture } = page.given;
      if (!picture) return result.clear();
      return result.show(async (signal) => {
        const found = await ask("segment", { image: picture.url }, signal);
        const stage = make("div", { class: "stage overlay" },
          shown(make("img", { src: picture.url, alt: picture.name })),
          make("img", { class: "coarse above", src: pngUrl(found.picture), alt: "" }));
        const [strength, slider] = field("Strength of the overlay",
          make("input", { type: "range", min: 0, max: 100, value: 60 }));
        const set = () => stage.style.setProperty("--strength", slider.value / 100);
        slider.addEventListener("input", set);
        set();
        const legend = make("ul", { class: "legend", "aria-label": "Classes by their share of the pixels" },
          ...found.classes.map(({ name, share, colour }) => {
            const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
            swatch.style.setProperty("--colour", colour);
            return make("li", {}, swatch, make("span", { class: "name", text: name }), make("span", { class: "number", text: percent(share) }));
          }));
        return [[make("div", { class: "split" }, make("div", {}, stage, strength), legend)],
          `Largest: ${found.classes[0].name}, ${percent(found.classes[0].share)} of the pixels.`];
      });
    },
  };
}

export function attentionPanel(page) {
  const result = new Result(NO_PICTURE);
  const layers = page.info.modes.attention.image?.layers ?? 0;
  const [chosenLayer, select] = field("Layer", make("select", {},
    make("option", { value: "rollout", text: "all, by rollout" }),
    ...Array.from({ length: layers }, (_, i) => make("option", { value: i + 1, text: `layer ${i + 1}` }))));
  select.addEventListener("change", () => update());
  const element = make("div", {},
    make("p", { class: "lead", text: "Where a word of the caption looks in the picture: attention averaged over heads." }),
    make("div", { class: "tools" }, chosenLayer), result.element);
  let word = null;

  function update() {
    const { picture, caption } = page.given;
    if (!picture) return result.clear();
    if (!caption) return result.clear("Write a caption first.");
    const layer = select.value === "rollout" ? undefined : Number(select.value);
    return result.show(async (signal) => {
      const found = await ask("attention", { image: picture.url, text: caption, layer }, signal);
      const heat = make("div", { class: "patches heat", "aria-hidden": "true" });
      const [rows, columns] = found.grid;
      heat.style.setProperty("--rows", rows);
      heat.style.setProperty("--columns", columns);
      const cells = Array.from({ length: rows * columns }, () => make("span", { class: "patch" }));
      heat.append(...cells);
      const stage = make("div", { class: "stage" }, shown(make("img", { src: picture.url, alt: picture.name })), heat);
      const said = make("div", { "aria-live": "polite" });
      const choice = new WordChoice((number) => {
        word = number;
        const weights = found.weights[number];
        const most = Math.max(...weights);
        cells.forEach((cell, i) => cell.style.setProperty("--heat", most ? weights[i] / most : 0));
        const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a]).slice(0, 3);
        const sum = weights.reduce((all, one) => all + one, 0);
        said.replaceChildren(
          make("p", {}, make("b", { text: readable(found.words[number]) }),
            ` gives ${percent(sum)} of its attention to the picture, most to`),
          make("ol", { class: "plain" }, ...order.map((i) =>
            make("li", { text: `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}: ${percent(weights[i])}` }))));
      });
      // The first word after [T_CLS], or the place that was chosen before.
      choice.set(found.words, word ?? 1);
      return [[choice.element, make("div", { class: "split" }, stage, said)], "Attention is shown for each word."];
    });
  }

  return { element, update: () => { word = null; return update(); } };
}
