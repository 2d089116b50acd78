// A picture that was dropped, picked or taken from the examples, and where one does that.

import { make, freshId } from "./dom.js";

const KINDS = "image/png,image/jpeg,image/webp,image/gif,image/bmp";

/** Reads a file as a data URL, which is both what is shown and what is sent. */
function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
}

/** Resolves when the browser can show it, with its size in pixels. */
function measured(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.addEventListener("load", () => resolve({ width: image.naturalWidth, height: image.naturalHeight }));
    image.addEventListener("error", () => reject(new Error("no picture")));
    image.src = url;
  });
}

/** Few pixels are shown as they are; many are smoothed. */
export function shown(image) {
  const mark = () => image.classList.toggle("coarse", image.naturalWidth > 0 && image.naturalWidth <= 128);
  image.addEventListener("load", mark);
  return image;
}

export class PictureChooser {
  /**
   * @param {string} label what the picture is for
   * @param {Object[]} examples as /examples gives them
   * @param {number} limit bytes of a file that the server takes
   * @param {(picture: {url: string, name: string, width: number, height: number, example?: Object}) => void} chosen
   */
  constructor(label, examples, limit, chosen) {
    this.picture = null;
    this.limit = limit;
    this.chosen = chosen;
    this.image = shown(make("img", { class: "preview", alt: "", hidden: true }));
    this.prompt = make("span", { class: "prompt", text: "Drop a picture here, or choose a file" });
    this.name = make("p", { class: "hush file-name" });
    this.trouble = make("p", { class: "notice bad", role: "alert", hidden: true });
    const id = freshId("file");
    this.input = make("input", { type: "file", id, class: "file", accept: KINDS, "aria-label": label,
      on: { change: () => this.#file(this.input.files[0]) } });
    this.zone = make("label", { class: "zone", for: id }, this.image, this.prompt);
    this.strip = make("div", { class: "strip", role: "group", "aria-label": `${label}: examples` },
      ...examples.map((example) =>
        make("button", { type: "button", class: "example", title: example.title, "aria-pressed": "false",
          on: { click: () => this.example(example) } },
        shown(make("img", { src: example.url, alt: example.title, loading: "lazy" })))));
    this.examples = examples;
    this.element = make("div", { class: "chooser" }, this.input, this.zone, this.name, this.trouble, this.strip);
    for (const name of ["dragenter", "dragover"])
      this.zone.addEventListener(name, (event) => {
        event.preventDefault();
        this.zone.classList.add("over");
      });
    for (const name of ["dragleave", "drop"])
      this.zone.addEventListener(name, () => this.zone.classList.remove("over"));
    this.zone.addEventListener("drop", (event) => {
      event.preventDefault();
      this.#file(event.dataTransfer.files[0]);
    });
  }

  /** Takes one of the examples. */
  async example(example) {
    const response = await fetch(example.url);
    if (!response.ok) return this.#refuse(`The example ${example.title} is not there.`);
    await this.#take(await response.blob(), example.title, example);
  }

  async #file(file) {
    if (!file) return;
    if (file.size > this.limit)
      return this.#refuse(`${file.name}: ${file.size} bytes; the server takes at most ${this.limit}.`);
    await this.#take(file, file.name);
  }

  async #take(blob, name, example) {
    try {
      const url = await dataUrl(blob);
      this.picture = { url, name, example, ...(await measured(url)) };
    } catch {
      return this.#refuse(`${name}: not a picture that this browser can show (PNG, JPEG, WebP, GIF, BMP).`);
    }
    this.trouble.hidden = true;
    this.prompt.hidden = true;
    this.image.hidden = false;
    this.image.src = this.picture.url;
    this.image.alt = name;
    this.name.textContent = `${name} · ${this.picture.width} × ${this.picture.height}`;
    [...this.strip.children].forEach((button, i) =>
      button.setAttribute("aria-pressed", String(this.examples[i] === example)));
    this.chosen(this.picture);
  }

  #refuse(text) {
    this.trouble.textContent = text;
    this.trouble.hidden = false;
  }
}
