// The picture with its patches over it, to be hidden with mouse, finger or keyboard.

import { arrowKeys, make } from "./dom.js";
import { shown } from "./picture.js";

export class PatchGrid {
  /** @param {() => void} changed is called after every change by the user */
  constructor(changed) {
    this.changed = changed;
    this.hidden = new Set();
    this.cells = [];
    this.image = shown(make("img", { alt: "", draggable: "false" }));
    this.grid = make("div", { class: "patches", role: "grid", "aria-multiselectable": "true",
      "aria-label": "Patches of the picture. Arrow keys move, Space hides or shows a patch." });
    this.element = make("div", { class: "stage" }, this.image, this.grid);
    this.#listen();
  }

  /** Shows a picture, cut into rows × columns patches; nothing is hidden. */
  set(url, alt, [rows, columns]) {
    this.rows = rows;
    this.columns = columns;
    this.hidden.clear();
    this.image.src = url;
    this.image.alt = alt;
    this.grid.style.setProperty("--rows", rows);
    this.grid.style.setProperty("--columns", columns);
    this.cells = [];
    const lines = [];
    for (let row = 0; row < rows; row += 1) {
      const line = make("div", { role: "row", class: "line" });
      for (let column = 0; column < columns; column += 1) {
        const cell = make("div", { role: "gridcell", class: "patch", tabindex: this.cells.length ? -1 : 0,
          "aria-selected": "false", "aria-label": `row ${row + 1}, column ${column + 1}`,
          "data-patch": this.cells.length });
        this.cells.push(cell);
        line.append(cell);
      }
      lines.push(line);
    }
    this.grid.replaceChildren(...lines);
  }

  /** Numbers of the hidden patches, row-major, rising. */
  numbers() {
    return [...this.hidden].sort((a, b) => a - b);
  }

  /** Hides exactly these. */
  hide(numbers) {
    const wanted = new Set(numbers);
    this.cells.forEach((_, number) => this.#mark(number, wanted.has(number)));
  }

  /** Hides a share of the patches as one rectangle at a random place, cut to the exact count. */
  hideBlock(share) {
    const count = Math.max(1, Math.round(share * this.cells.length));
    const shape = Math.exp((Math.random() - 0.5) * 1.2);
    const height = Math.min(this.rows, Math.max(1, Math.round(Math.sqrt(count * shape))));
    const width = Math.min(this.columns, Math.ceil(count / height));
    const tall = Math.min(this.rows, Math.ceil(count / width));
    const top = Math.floor(Math.random() * (this.rows - tall + 1));
    const left = Math.floor(Math.random() * (this.columns - width + 1));
    const inside = [];
    for (let row = top; row < top + tall; row += 1)
      for (let column = left; column < left + width; column += 1) inside.push(row * this.columns + column);
    this.hide(inside.slice(0, count));
    this.changed();
  }

  #mark(number, hidden) {
    if (hidden) this.hidden.add(number);
    else this.hidden.delete(number);
    this.cells[number].setAttribute("aria-selected", String(hidden));
  }

  #listen() {
    let painting = null; // true: hides, false: shows, null: no stroke
    const at = (event) => {
      const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest(".patch");
      return cell && this.grid.contains(cell) ? Number(cell.dataset.patch) : null;
    };
    this.grid.addEventListener("pointerdown", (event) => {
      const number = at(event);
      if (number === null || event.button !== 0) return;
      event.preventDefault();
      this.grid.setPointerCapture(event.pointerId);
      painting = !this.hidden.has(number);
      this.#mark(number, painting);
    });
    this.grid.addEventListener("pointermove", (event) => {
      const number = painting === null ? null : at(event);
      if (number !== null) this.#mark(number, painting);
    });
    for (const name of ["pointerup", "pointercancel"])
      this.grid.addEventListener(name, () => {
        if (painting !== null) this.changed();
        painting = null;
      });
    this.grid.addEventListener("keydown", (event) => {
      const number = this.cells.indexOf(document.activeElement);
      if (number < 0 || (event.key !== " " && event.key !== "Enter")) return;
      event.preventDefault();
      this.#mark(number, !this.hidden.has(number));
      this.changed();
    });
    arrowKeys(this.grid, () => this.cells, () => this.columns);
  }
}

/** A canvas with the picture at its own size and some patches covered. */
export async function covered(url, [rows, columns], hidden, colour) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = make("canvas");
  // Patches get whole pixels: small pictures are drawn larger.
  const scale = Math.max(1, Math.ceil(320 / Math.max(image.naturalWidth, image.naturalHeight)));
  canvas.width = image.naturalWidth * scale;
  canvas.height = image.naturalHeight * scale;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = scale === 1;
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  pen.fillStyle = colour;
  const [height, width] = [canvas.height / rows, canvas.width / columns];
  for (const number of hidden) {
    const [row, column] = [Math.floor(number / columns), number % columns];
    pen.fillRect(column * width, row * height, Math.ceil(width), Math.ceil(height));
  }
  return canvas;
}
