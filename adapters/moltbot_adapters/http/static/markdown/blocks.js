// Splits Markdown into blocks. Pure text to values: no nodes here. Every step is linear in the text; depth is bounded.

const DEPTH = 10; // quotes and lists nested deeper than this are shown as they were written

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const TASK = /^\[([ xX])\][ \t]+/;
const DELIMITER = /^:?-+:?$/;

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;

function fenceOf(line) {
  const match = FENCE.exec(line);
  if (!match || (match[2][0] === "`" && match[3].includes("`"))) return null;
  return { indent: match[1].length, mark: match[2], info: match[3].trim() };
}

function closes(fence, line) {
  const text = line.trim();
  return indent(line) < 4 && text.length >= fence.mark.length && text === fence.mark[0].repeat(text.length);
}

function itemOf(line) {
  const match = ITEM.exec(line);
  if (!match || RULE.test(line)) return null;
  const spaces = match[3] === undefined ? 1 : match[3].length > 4 ? 1 : match[3].length;
  const ordered = match[2].length > 1;
  return {
    indent: match[1].length, content: match[1].length + match[2].length + spaces, ordered,
    number: ordered ? parseInt(match[2], 10) : 0, sort: match[2].at(-1), empty: match[4] === undefined || match[4] === "",
  };
}

/** Whether a line ends a paragraph by starting something else. */
function interrupts(line) {
  if (blank(line) || QUOTE.test(line) || HEADING.test(line) || RULE.test(line) || fenceOf(line)) return true;
  const item = indent(line) < 4 ? itemOf(line) : null;
  return item !== null && !item.empty && (!item.ordered || item.number === 1);
}

/**
 * Parses lines into blocks {type, from, to, raw, …}: `from`/`to` are line numbers within `lines`, `raw` is the source.
 * Types: paragraph, heading, rule, code, quote (children), list (items with children), table.
 */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const block = readBlock(lines, at, depth);
    block.from = at;
    block.raw = lines.slice(at, block.to).join("\n");
    blocks.push(block);
    at = block.to;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = fenceOf(line);
  if (fence) return readFence(lines, at, fence);
  if (RULE.test(line)) return { type: "rule", to: at + 1 };
  const heading = HEADING.exec(line);
  if (heading) return readHeading(heading, at);
  if (depth < DEPTH) {
    if (QUOTE.test(line)) return readQuote(lines, at, depth);
    const item = indent(line) < 4 ? itemOf(line) : null;
    if (item) return readList(lines, at, item, depth);
  }
  if (/^(?: {4}|\t)/.test(line)) return readIndented(lines, at);
  return readTable(lines, at) ?? readParagraph(lines, at);
}

function readHeading(match, at) {
  let text = (match[2] ?? "").trim();
  let closing = 0;
  while (text.at(-closing - 1) === "#") closing += 1;
  if (closing && (closing === text.length || text.at(-closing - 1) === " ")) text = text.slice(0, -closing).trim();
  return { type: "heading", level: match[1].length, text, to: at + 1 };
}

function readFence(lines, at, fence) {
  const code = [];
  let to = at + 1;
  let open = true;
  for (; to < lines.length && open; to += 1) {
    if (closes(fence, lines[to])) open = false;
    else code.push(lines[to].slice(Math.min(fence.indent, indent(lines[to]))));
  }
  return { type: "code", lang: fence.info.split(/[\s{,]/)[0], code, open, to };
}

function readIndented(lines, at) {
  let to = at;
  let end = at;
  for (; to < lines.length && (blank(lines[to]) || /^(?: {4}|\t)/.test(lines[to])); to += 1) {
    if (!blank(lines[to])) end = to + 1;
  }
  return { type: "code", lang: "", code: lines.slice(at, end).map((line) => line.replace(/^(?: {1,4}|\t)/, "")), open: false, to: end };
}

function readParagraph(lines, at) {
  let to = at + 1;
  while (to < lines.length && !interrupts(lines[to]) && !startsTable(lines, to)) to += 1;
  return { type: "paragraph", text: lines.slice(at, to).map((line) => line.trimStart()).join("\n").trimEnd(), to };
}

function readQuote(lines, at, depth) {
  const inner = [];
  let to = at;
  for (; to < lines.length; to += 1) {
    if (QUOTE.test(lines[to])) inner.push(lines[to].replace(QUOTE, ""));
    else if (inner.length && !blank(inner.at(-1)) && !interrupts(lines[to]) && !fenceOf(inner[0])) inner.push(lines[to]);
    else break;
  }
  return { type: "quote", children: parseBlocks(inner, depth + 1), to };
}

function readList(lines, at, first, depth) {
  const items = [];
  let to = at;
  let loose = false;
  while (to < lines.length) {
    const head = itemOf(lines[to]);
    if (!head || head.sort !== first.sort || head.indent > first.indent + 1) break;
    const item = readItem(lines, to, head, depth);
    loose ||= item.loose || (item.gap && item.more);
    items.push(item);
    to = item.next;
    if (item.next >= lines.length) break;
  }
  const end = items.at(-1).to; // blank lines after the last item are not part of the list
  return { type: "list", ordered: first.ordered, start: first.number, loose, items, to: end };
}

/** One item: its own line and every line that is indented under it (two spaces are enough, as models write them). */
function readItem(lines, at, head, depth) {
  const least = Math.min(head.content, head.indent + 2);
  const inner = [lines[at].slice(head.content).trimStart() === "" ? "" : lines[at].slice(head.content)];
  let fence = fenceOf(inner[0]);
  let to = at + 1;
  let end = to;
  for (; to < lines.length; to += 1) {
    const line = lines[to];
    if (blank(line)) {
      inner.push("");
      continue;
    }
    const under = indent(line) >= least;
    if (!under && (blank(inner.at(-1)) || fence || interrupts(line) || itemOf(line))) break;
    const text = under ? line.slice(Math.min(head.content, indent(line))) : line;
    if (fence) fence = closes(fence, text) ? null : fence;
    else fence = fenceOf(text);
    inner.push(text);
    end = to + 1;
  }
  const body = inner.slice(0, end - at);
  const task = TASK.exec(body[0]);
  if (task) body[0] = body[0].slice(task[0].length);
  const children = parseBlocks(body, depth + 1);
  const next = to < lines.length ? itemOf(lines[to]) : null;
  return {
    type: "item", raw: lines.slice(at, end).join("\n"), task: task ? task[1] !== " " : null, children, to: end, next: to,
    gap: to > end, more: next !== null && next.sort === head.sort, loose: apart(children),
  };
}

/** Whether two plain children of an item are apart by a blank line, which makes the whole list airy. */
function apart(children) {
  return children.some((child, i) => i > 0 && child.type === "paragraph" && child.from > children[i - 1].to);
}

function cells(line) {
  const parts = [];
  let cell = "";
  const text = line.trim().replace(/^\|/, "");
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (text[i] === "|") {
      parts.push(cell.trim());
      cell = "";
    } else cell += text[i];
  }
  if (cell.trim() !== "") parts.push(cell.trim());
  return parts;
}

function startsTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const rule = cells(lines[at + 1]);
  return rule.every((cell) => DELIMITER.test(cell)) && cells(lines[at]).length === rule.length;
}

function readTable(lines, at) {
  if (!startsTable(lines, at)) return null;
  const align = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const rows = [];
  let to = at + 2;
  for (; to < lines.length && !interrupts(lines[to]); to += 1) {
    const row = cells(lines[to]).slice(0, align.length);
    while (row.length < align.length) row.push("");
    rows.push({ type: "row", raw: lines[to], cells: row });
  }
  return { type: "table", head: cells(lines[at]), align, rows, to };
}
