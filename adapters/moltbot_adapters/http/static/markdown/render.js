// Draws blocks and keeps them up to date while text streams in: what did not change keeps its nodes (and a reader's selection).

import { h } from "../dom.js";
import { parseBlocks } from "./blocks.js";
import { CodeView } from "./code.js";
import { renderInline } from "./inline.js";

/** A last line that may yet become a marker of something else: it waits for its next character instead of flickering. */
const UNDECIDED = /\n[ \t]*(?:\d{1,9}[.)]?|[-*+_]{1,3}|#{1,6}|`{1,3}|~{1,3}|>|\|[^|\n]{0,40})[ \t]*$/;

/** Shows one growing Markdown text in `host`. */
export class MarkdownView {
  constructor(host) {
    this.host = host;
    this.clear();
  }

  clear() {
    this.text = "";
    this.done = false;
    this.settled = []; // finished blocks: never parsed again
    this.tail = []; // blocks that more text may still change
    this.tailStart = 0; // where the tail begins in the text
    this.host.replaceChildren();
  }

  /** Draws `text`, which usually continues what was drawn. Answers the nodes of the blocks that are finished since the last call. */
  update(whole, done = false) {
    const text = done ? whole : whole.slice(0, whole.length - (UNDECIDED.exec(whole.slice(-80))?.[0].length ?? 0));
    if (!text.startsWith(this.text) || (this.done && text !== this.text)) this.clear();
    this.text = text;
    this.done = done;
    const lines = text.slice(this.tailStart).split("\n");
    const blocks = parseBlocks(lines);
    if (!done && blocks.length) markLive(blocks.at(-1));
    const after = this.settled.at(-1)?.node ?? null;
    patch(this.host, this.tail, blocks, after);
    this.tail = blocks;
    return this.#settle(lines, done);
  }

  /** Moves finished blocks out of the tail. A block is finished when another one follows that starts on a whole line. */
  #settle(lines, done) {
    const last = this.tail.at(-1);
    if (!last) return [];
    const whole = last.from < lines.length - 1;
    const keep = done ? 0 : whole ? 1 : 2;
    const count = Math.max(0, this.tail.length - keep);
    if (count === 0) return [];
    const fresh = this.tail.splice(0, count);
    if (this.tail.length) for (const line of lines.slice(0, this.tail[0].from)) this.tailStart += line.length + 1;
    else this.tailStart = this.text.length;
    this.settled.push(...fresh.map(({ node }) => ({ node })));
    return fresh.map(({ node }) => node);
  }
}

/** Marks the block at the growing end, down to the innermost one. */
function markLive(block) {
  block.live = true;
  const inner = block.type === "list" ? block.items.at(-1) : block.children?.at(-1);
  if (inner) markLive(inner);
}

/** Makes the nodes under `host` (those of `old`, after `after`) show `next`. */
function patch(host, old, next, after = null) {
  let before = after;
  next.forEach((block, i) => {
    const known = old[i];
    if (known && known.type === block.type && known.raw === block.raw && !known.live === !block.live) keep(block, known);
    else if (known && known.type === block.type && UPDATES[block.type]?.(block, known)) block.node = known.node;
    else {
      block.node = DRAW[block.type](block);
      if (known) known.node.replaceWith(block.node);
      else if (before) before.after(block.node);
      else host.prepend(block.node);
    }
    before = block.node;
  });
  for (const gone of old.slice(next.length)) gone.node.remove();
}

function keep(block, known) {
  for (const field of ["node", "children", "items", "rows", "view", "body"]) if (known[field] !== undefined) block[field] = known[field];
}

function drawChildren(node, block) {
  block.body = node;
  patch(node, [], block.children);
  return node;
}

function inline(tag, block, className = "") {
  const node = h(tag, { class: className || undefined, dir: "auto" });
  renderInline(node, block.text, block.live);
  return node;
}

const DRAW = {
  paragraph: (block) => inline("p", block),
  heading: (block) => inline(`h${Math.min(6, block.level + 2)}`, block, `h${block.level}`), // h1 is the chat, h2 the message
  rule: () => h("hr"),
  quote: (block) => drawChildren(h("blockquote"), block),
  code(block) {
    block.view = new CodeView(block.lang);
    block.view.update(block.code, block.open);
    return block.view.node;
  },
  list(block) {
    const node = h(block.ordered ? "ol" : "ul", { class: block.loose ? "" : "tight" });
    if (block.ordered && block.start !== 1) node.start = block.start;
    patch(node, [], block.items);
    return node;
  },
  item(block) {
    const node = h("li", { class: block.task === null ? undefined : "task" });
    if (block.task === null) return drawChildren(node, block);
    const box = h("input", { type: "checkbox", disabled: true, checked: block.task, tabIndex: -1 });
    node.append(box, drawChildren(h("div"), block));
    return node;
  },
  table(block) {
    const head = h("thead", {}, row(block.head, "th", block.align));
    block.body = h("tbody");
    for (const line of block.rows) line.align = block.align;
    patch(block.body, [], block.rows);
    return h("div", { class: "table-scroll", tabIndex: 0 }, h("table", {}, head, block.body));
  },
  row: (block) => row(block.cells, "td", block.align),
};

function row(cells, tag, align) {
  const node = h("tr");
  cells.forEach((text, i) => {
    const cell = h(tag, { class: align[i] === "left" ? undefined : align[i], dir: "auto" });
    renderInline(cell, text);
    node.append(cell);
  });
  return node;
}

/** Each answers whether it could bring the known node up to date. */
const UPDATES = {
  paragraph(block, known) {
    renderInline(known.node, block.text, block.live);
    return true;
  },
  quote(block, known) {
    block.body = known.body;
    patch(block.body, known.children, block.children);
    return true;
  },
  code(block, known) {
    if (block.lang !== known.lang) return false;
    block.view = known.view;
    block.view.update(block.code, block.open);
    return true;
  },
  list(block, known) {
    if (block.ordered !== known.ordered || block.start !== known.start) return false;
    known.node.className = block.loose ? "" : "tight";
    patch(known.node, known.items, block.items);
    return true;
  },
  item(block, known) {
    if (block.task !== known.task) return false;
    block.body = known.body;
    patch(block.body, known.children, block.children);
    return true;
  },
  table(block, known) {
    if (block.head.join("\n") !== known.head.join("\n") || block.align.join() !== known.align.join()) return false;
    block.body = known.body;
    for (const line of block.rows) line.align = block.align;
    patch(block.body, known.rows, block.rows);
    return true;
  },
};
