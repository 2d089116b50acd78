// The page: what the server can do becomes tabs; picture and caption go to the panel that is open.

import { ApiError, examples, info } from "./api.js";
import { arrowKeys, make, settled } from "./dom.js";
import { answerPanel, classifyPanel, comparePanel, entailPanel, matchPanel } from "./panel_ask.js";
import { fillPanel } from "./panel_fill.js";
import { attentionPanel, segmentPanel } from "./panel_maps.js";
import { searchPanel } from "./panel_search.js";
import { PictureChooser } from "./picture.js";

// Title, the mode it needs, and what builds it.
const PANELS = [
  ["Hide and fill", "fill_words", fillPanel],
  ["Ask", "answer", answerPanel],
  ["Match captions", "match", matchPanel],
  ["Compare two", "compare", comparePanel],
  ["Entailment", "entail", entailPanel],
  ["Classify", "classify", classifyPanel],
  ["Segment", "segment", segmentPanel],
  ["Attention", "attention", attentionPanel],
  ["Search", "search", searchPanel],
];
const TYPING = 400; // milliseconds without a key before the panel hears of a new caption

const caption = document.getElementById("caption");

async function start() {
  const facts = await info();
  const page = {
    info: facts,
    examples: await examples(),
    given: { picture: null, caption: "" },
    // A picture travels as base64: four bytes for three, and some for the rest.
    fileLimit: Math.floor((facts.limits.body_bytes - 10_000) * 0.75),
    /** Rows and columns of patches of the run that answers a mode; null if none does. */
    gridOf: (mode) => facts.modes[mode].image?.grid ?? null,
  };
  showRuns(facts);
  const open = buildTabs(page);
  const chooser = new PictureChooser("Picture", page.examples, page.fileLimit, (picture) => {
    page.given.picture = picture;
    if (picture.example) caption.value = picture.example.text;
    page.given.caption = caption.value.trim();
    open.changed();
  });
  document.getElementById("picture").append(chooser.element);
  const typed = settled(() => {
    if (caption.value.trim() === page.given.caption) return;
    page.given.caption = caption.value.trim();
    open.changed();
  }, TYPING);
  caption.addEventListener("input", typed);
  page.given.caption = caption.value.trim();
  if (page.examples.length) await chooser.example(page.examples[0]);
}

function showRuns({ version, runs }) {
  const holder = document.getElementById("runs");
  holder.querySelector("summary").textContent =
    runs.length === 1 ? `${runs[0].name} · ${runs[0].task}` : `${runs.length} runs`;
  const head = ["run", "trained for", "step", "parameters", "weights"].map((text) => make("th", { scope: "col", text }));
  const rows = runs.map((run) =>
    make("tr", {}, ...[run.name, run.task, run.step.toLocaleString("en"), run.parameters.toLocaleString("en"),
      run.digest.slice(0, 12)].map((text) => make("td", { text }))));
  holder.querySelector(".table").replaceChildren(
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
    make("p", { class: "hush", text: `vlbeit ${version}` }));
  holder.hidden = false;
}

/** Tabs and their panels; returns {changed}: the open panel is told, the others when they open. */
function buildTabs(page) {
  const list = document.getElementById("tabs");
  const holder = document.getElementById("panels");
  const stale = new Set();
  const tabs = PANELS.map(([title, mode, build], i) => {
    const facts = page.info.modes[mode];
    const panel = facts.available ? build(page) : lackingPanel(title, facts.command);
    const element = make("section", { id: `panel-${mode}`, class: "card panel", role: "tabpanel", tabindex: 0,
      "aria-labelledby": `tab-${mode}`, hidden: true }, panel.element);
    const tab = make("button", { type: "button", id: `tab-${mode}`, class: "tab", role: "tab", "aria-controls": element.id,
      on: { click: () => open(i) } }, title,
    ...(facts.available ? [] : [make("span", { class: "lacking", text: " (not in these runs)" })]));
    return { tab, element, panel, available: facts.available };
  });
  list.append(...tabs.map(({ tab }) => tab));
  holder.append(...tabs.map(({ element }) => element));
  arrowKeys(list, () => tabs.map(({ tab }) => tab), () => 0, (tab) => tab.click());
  let current = -1;

  function open(number) {
    current = number;
    tabs.forEach(({ tab, element }, i) => {
      tab.setAttribute("aria-selected", String(i === number));
      tab.tabIndex = i === number ? 0 : -1;
      element.hidden = i !== number;
    });
    if (stale.delete(number)) tabs[number].panel.update();
  }

  open(Math.max(0, tabs.findIndex(({ available }) => available)));
  return {
    changed() {
      tabs.forEach((_, i) => stale.add(i));
      open(current);
    },
  };
}

function lackingPanel(title, command) {
  const copy = make("button", { type: "button", text: "Copy", on: { click: async () => {
    await navigator.clipboard.writeText(command);
    copy.textContent = "Copied";
  } } });
  return {
    update() {},
    element: make("div", { class: "lacks" },
      make("p", { class: "lead", text: `${title}: none of the runs that are served can do this.` }),
      make("p", { text: "This command makes one that can; then serve it too." }),
      make("div", { class: "command" }, make("code", { text: command }), copy)),
  };
}

try {
  await start();
} catch (error) {
  const trouble = document.getElementById("trouble");
  trouble.textContent = error instanceof ApiError ? error.message : `The page has a fault: ${error.message}`;
  trouble.hidden = false;
  if (!(error instanceof ApiError)) throw error;
}
