// What is wrong with the page that is open: names, roles, sizes, contrast, width. Run by test_page.py.
() => {
  const problems = [];
  const tell = (element, what) => problems.push(`${what}: ${element.outerHTML.slice(0, 120)}`);
  const seen = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const unseen = (element) => element.closest(".unseen, .skip, .lacking, .file") !== null;
  const byId = (ids) => ids.split(" ").map((id) => document.getElementById(id));
  const name = (element) => {
    const labelled = element.getAttribute("aria-labelledby");
    const parts = labelled ? byId(labelled) : [element, ...(element.labels ?? [])];
    return parts.map((one) => [one?.getAttribute("aria-label"), one?.textContent,
      ...[...(one?.querySelectorAll("img") ?? [])].map((image) => image.alt)].join(" ")).join(" ").trim();
  };

  // Names, roles and references.
  const parents = { tab: "[role=tablist]", gridcell: "[role=row]", row: "[role=grid]", radio: "[role=radiogroup]" };
  for (const element of document.querySelectorAll("button, input, select, textarea, a[href], summary, [role], [tabindex='0']")) {
    if (!seen(element)) continue;
    const role = element.getAttribute("role");
    const silent = ["status", "alert", "row", "none"].includes(role);
    if (!silent && !name(element)) tell(element, "no name");
    if (parents[role] && !element.closest(parents[role])) tell(element, `${role} outside its holder`);
    for (const attribute of ["aria-controls", "aria-labelledby"])
      if (element.hasAttribute(attribute) && byId(element.getAttribute(attribute)).includes(null))
        tell(element, `${attribute} of nothing`);
    const box = element.getBoundingClientRect();
    const inline = element.matches("a, .file, [role=status], [role=alert], [role=row]");
    if (!inline && !unseen(element) && (box.width < 24 || box.height < 24)) tell(element, "smaller than 24 px");
  }
  for (const image of document.querySelectorAll("img")) if (!image.hasAttribute("alt")) tell(image, "no alt");
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  if (new Set(ids).size !== ids.length) problems.push("an id stands twice");
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].filter(seen).map((h) => Number(h.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) problems.push("not one h1");
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) problems.push(`h${level} after h${levels[i - 1]}`); });
  if (!document.documentElement.lang) problems.push("no language");
  if (document.querySelectorAll("[role=tab][tabindex='0']").length !== 1) problems.push("not one tab in the Tab order");

  // Contrast of ink and ground (WCAG 2, 1.4.3), and nothing wider than the window.
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const ground = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.push(rgba(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !seen(element) || unseen(element)) continue;
    texts += 1;
    const style = getComputedStyle(element);
    const back = ground(element);
    const [a, b] = [light(over(rgba(style.color), back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) tell(element, `contrast ${ratio.toFixed(2)}`);
  }
  if (texts < 10) problems.push(`only ${texts} texts`);
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) problems.push(`${root.scrollWidth - root.clientWidth} px too wide`);
  return problems;
}
