// Elements and numbers. Whatever comes from outside (captions, file names, labels, messages) enters
// the page as text here and nowhere as markup.

/**
 * An element.
 * @param {string} tag
 * @param {{text?: string, class?: string, on?: Object<string, Function>}} facts other keys become attributes;
 *   false, null and undefined leave an attribute out
 * @param {...(Node|string)} children
 */
export function make(tag, facts = {}, ...children) {
  const { text, class: className, on = {}, ...attributes } = facts;
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      element.setAttribute(name, String(value));
  }
  for (const [name, handler] of Object.entries(on)) element.addEventListener(name, handler);
  element.append(...children);
  return element;
}

let made = 0;

/** An id that no other element has. */
export function freshId(prefix) {
  made += 1;
  return `${prefix}-${made}`;
}

/** 0.9812 as "98.1 %", with a space that does not break. */
export function percent(share) {
  const value = 100 * share;
  return value > 0 && value < 0.05 ? "<\u00a00.1\u00a0%" : `${value.toFixed(1)}\u00a0%`;
}

/** "1 patch", "3 patches". */
export function counted(count, one, many) {
  return `${count} ${count === 1 ? one : many}`;
}

/** Calls `act` once, `wait` milliseconds after the last call. */
export function settled(act, wait) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, wait);
  };
}

/** A labelled field; returns [label element, input element]. */
export function field(label, input) {
  input.id ||= freshId("field");
  return [make("label", { class: "field", for: input.id }, make("span", { text: label }), input), input];
}

/**
 * Names with a share in [0, 1] each, as bars.
 * @param {{name: string, share: number, right?: boolean, said?: string}[]} rows
 */
export function bars(rows, label) {
  return make(
    "ol",
    { class: "bars", "aria-label": label },
    ...rows.map(({ name, share, right, said }) => {
      const fill = make("span", { class: "fill" });
      fill.style.setProperty("--share", Math.max(0, Math.min(1, share)));
      return make(
        "li",
        { class: right ? "right" : "" },
        make("span", { class: "name" }, name, ...(right ? [make("span", { "aria-hidden": "true", text: " \u25c2" }), make("span", { class: "unseen", text: " (the hidden word)" })] : [])),
        make("span", { class: "track", "aria-hidden": "true" }, fill),
        make("span", { class: "number", text: said ?? percent(share) }),
      );
    }),
  );
}

/**
 * Arrow keys, Home and End among elements of which one can be reached by Tab.
 * @param {HTMLElement} holder
 * @param {() => HTMLElement[]} all
 * @param {() => number} width columns, for Up and Down; 0: one line, where Up and Down are as Left and Right
 * @param {(element: HTMLElement) => void} [arrived]
 */
export function arrowKeys(holder, all, width, arrived = () => {}) {
  holder.addEventListener("keydown", (event) => {
    const elements = all();
    const columns = width();
    const at = elements.indexOf(document.activeElement);
    if (at < 0) return;
    const down = columns || 1;
    const column = columns ? at % columns : at;
    const last = columns ? columns - 1 : elements.length - 1;
    let to = { ArrowUp: at - down, ArrowDown: at + down, Home: at - column, End: at - column + last }[event.key];
    if (event.key === "ArrowLeft" && (column > 0 || !columns)) to = at - 1;
    if (event.key === "ArrowRight" && (column < last || !columns)) to = at + 1;
    if (to === undefined) return;
    event.preventDefault();
    if (!columns) to = (to + elements.length) % elements.length;
    if (to < 0 || to >= elements.length) return;
    elements[at].tabIndex = -1;
    elements[to].tabIndex = 0;
    elements[to].focus();
    arrived(elements[to]);
  });
}
