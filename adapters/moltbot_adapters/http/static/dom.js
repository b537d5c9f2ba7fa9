// Small building blocks for the page's own nodes. Text always goes in as text; nothing here reads markup.

/** Makes an element. `props`: class, text, on (event -> handler), attrs (name -> value), plus DOM properties by name. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  if (tag === "button") node.type = tag; // not "submit"
  for (const [name, value] of Object.entries(props)) {
    if (value == null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (name === "attrs") for (const [key, text] of Object.entries(value)) node.setAttribute(key, text);
    else node[name] = value;
  }
  for (const child of children) if (child) node.append(child);
  return node;
}

const SHAPES = {
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  check: "M5 12.5l4.5 4.5L19 7.5",
  trash: "M4 7h16M9 7V4h6v3M6.5 7l1 13h9l1-13M10 11v5M14 11v5",
  menu: "M4 6h16M4 12h16M4 18h10",
  down: "M12 5v14M6 13l6 6 6-6",
  retry: "M19 12a7 7 0 1 1-2.3-5.2M19 4v4.5h-4.5",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  sun: "M12 8a4 4 0 1 0 0 8a4 4 0 0 0 0-8zM12 3v1.5M12 19.5V21M3 12h1.5M19.5 12H21M5.6 5.6l1.1 1.1M17.3 17.3l1.1 1.1M18.4 5.6l-1.1 1.1M6.7 17.3l-1.1 1.1",
  moon: "M20 14.5A8 8 0 0 1 9.5 4A8 8 0 1 0 20 14.5z",
  screen: "M4 5h16v11H4zM9 20h6M12 16v4",
  globe: "M12 3.5a8.5 8.5 0 1 0 0 17a8.5 8.5 0 0 0 0-17zM3.5 12h17M12 3.5c2.6 2.4 3.6 5.2 3.6 8.5s-1 6.1-3.6 8.5c-2.6-2.4-3.6-5.2-3.6-8.5s1-6.1 3.6-8.5z",
  leave: "M14 5H6v14h8M10 12h10M16.5 8.5L20 12l-3.5 3.5",
  alert: "M12 8v5M12 16.2v.3M12 3.5L2.8 19.5h18.4z",
  bolt: "M13 3L5 13.5h6L10.5 21L19 10h-6.2z",
  code: "M9 7l-5 5 5 5M15 7l5 5-5 5",
  chat: "M5 5h14a1.5 1.5 0 0 1 1.5 1.5v9A1.5 1.5 0 0 1 19 17h-7l-5 3.5V17H5a1.5 1.5 0 0 1-1.5-1.5v-9A1.5 1.5 0 0 1 5 5z",
  link: "M10 14a4 4 0 0 0 5.7 0l3-3A4 4 0 0 0 13 5.3l-1 1M14 10a4 4 0 0 0-5.7 0l-3 3A4 4 0 0 0 11 18.7l1-1",
  tool: "M14.5 6.5a4 4 0 0 0-5.2 5.2L4 17l3 3 5.3-5.3a4 4 0 0 0 5.2-5.2L15 12l-3-3z",
  swap: "M7 8h12M15.5 4.5L19 8l-3.5 3.5M17 16H5M8.5 12.5L5 16l3.5 3.5",
  clip: "M8 12.5l6-6a3 3 0 0 1 4.2 4.2l-8 8a5 5 0 0 1-7-7l7.5-7.5",
};

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** Makes one line icon of ours, hidden from screen readers (the control that holds it has the label). */
export function icon(name) {
  const root = svg("svg", { viewBox: "0 0 24 24", class: `icon icon-${name}`, "aria-hidden": "true" });
  root.append(svg("path", { d: SHAPES[name] }));
  return root;
}

/** Makes MoltBot's mark: a speech bubble that has just stepped out of its old shell. */
export function mark() {
  const root = svg("svg", { viewBox: "0 0 32 32", class: "mark", "aria-hidden": "true" });
  root.append(
    svg("path", { class: "mark-shell", d: "M10 3h11a8 8 0 0 1 8 8v7" }),
    svg("path", {
      class: "mark-body",
      d: "M10.5 7h8A7.5 7.5 0 0 1 26 14.5v5A7.5 7.5 0 0 1 18.5 27H11l-5.2 2.6a1 1 0 0 1-1.4-1.15L5.2 25A7.5 7.5 0 0 1 3 19.5v-5A7.5 7.5 0 0 1 10.5 7z",
    }),
    svg("circle", { class: "mark-eye", cx: 11, cy: 17, r: 2 }),
    svg("circle", { class: "mark-eye", cx: 18, cy: 17, r: 2 }),
  );
  return root;
}

/** Copies text; falls back to a selection where the clipboard API is missing (plain http on a LAN). Answers whether it worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { value: text, class: "visually-hidden", ariaHidden: "true" });
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus?.();
    return done;
  }
}
