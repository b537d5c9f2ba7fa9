// Turns the text inside a block into nodes: emphasis, code, links. Text becomes text nodes; markup in it stays visible text.

import { h, icon } from "../dom.js";
import { say } from "../i18n.js";

const DEEPEST = 24; // emphasis nested deeper is shown as it was written
const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", hellip: "…", mdash: "—", ndash: "–", times: "×", rarr: "→", larr: "←", middot: "·" };

const PLAIN = /[^\\`*_~[\]!<&\nh]+/y;
const URL_RUN = /https?:\/\/[^\s<>"'`[\]\u2018-\u201f\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+/iy;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]*|[^\s<>@]{1,64}@[^\s<>@]{1,255})>/iy;
const ENTITY = /&(?:#(\d{1,7})|#x([0-9a-f]{1,6})|([a-z]{2,8}));/iy;
const BREAK = /<br[ \t]*\/?>/iy;
const TARGET = /\([ \t]*(?:<([^<>\n]*)>|((?:[^\s()<>\\]|\\.|\([^\s()<>]*\))*))(?:[ \t]+(?:"[^"\n]*"|'[^'\n]*'))?[ \t]*\)/y;
const HALF_LINK = /!?\[([^[\]\n]{0,200})\]\([^\s()]{0,2000}$/;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const WIDE = /[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]/; // scripts that put no spaces between words

/** Puts `text` into `host`. While an answer is still `live`, an emphasis or a link that is not closed yet is shown as it will be. */
export function renderInline(host, text, live = false) {
  const source = live ? text.replace(HALF_LINK, "$1") : text;
  const { dir } = host;
  host.dir = ""; // while it is "auto", each node that is put in costs a look at all those before it
  host.replaceChildren(resolve(scan(source, live), live));
  host.dir = dir;
}

/** The address of a link, or null when it must not be one. */
export function safeAddress(text) {
  let url;
  try {
    url = new URL(text); // relative addresses have no scheme and fail here, as they must
  } catch {
    return null;
  }
  return SCHEMES.has(url.protocol) ? url.href : null;
}

function at(pattern, text, index) {
  pattern.lastIndex = index;
  return pattern.exec(text);
}

function scan(text, live) {
  const pieces = [];
  const brackets = [];
  const ticks = tickRuns(text);
  const word = (value) => (typeof pieces.at(-1) === "string" ? (pieces[pieces.length - 1] += value) : pieces.push(value));
  let i = 0;
  while (i < text.length) {
    const plain = at(PLAIN, text, i);
    if (plain) {
      word(plain[0]);
      i += plain[0].length;
      continue;
    }
    const step = special(text, i, { pieces, brackets, ticks, live });
    if (step.text !== undefined) word(step.text);
    if (step.piece) pieces.push(step.piece);
    i = step.next;
  }
  return pieces;
}

function special(text, i, state) {
  const char = text[i];
  if (char === "\n") return { piece: h("br"), next: i + 1 };
  if (char === "\\") return escaped(text, i);
  if (char === "`") return code(text, i, state);
  if (char === "*" || char === "_" || char === "~") return delimiter(text, i);
  if (char === "h") return bareLink(text, i);
  if (char === "<") return angle(text, i);
  if (char === "&") return entity(text, i);
  if (char === "]") return closeBracket(text, i, state);
  const picture = char === "!" && text[i + 1] === "[";
  if (char === "!" && !picture) return { text: "!", next: i + 1 };
  const piece = { bracket: true, picture, text: picture ? "![" : "[" };
  state.brackets.push({ piece, index: state.pieces.length });
  return { piece, next: i + piece.text.length };
}

function escaped(text, i) {
  const next = text[i + 1];
  if (next === "\n") return { piece: h("br"), next: i + 2 };
  if (next && /[!-/:-@[-`{-~]/.test(next)) return { text: next, next: i + 2 };
  return { text: "\\", next: i + 1 };
}

/** Where runs of each length of backticks stand, the last one first, so that a partner is found without a search. */
function tickRuns(text) {
  const places = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!places.has(run.length)) places.set(run.length, []);
    places.get(run.length).push(index);
  }
  for (const indexes of places.values()) indexes.reverse();
  return places;
}

function code(text, i, { ticks, live }) {
  let end = i;
  while (text[end] === "`") end += 1;
  const mark = text.slice(i, end);
  const places = ticks.get(mark.length) ?? [];
  while (places.at(-1) < end) places.pop(); // the text is read once, from its start to its end
  if (places.length) {
    const partner = places.at(-1);
    let value = text.slice(end, partner).replace(/\n/g, " ");
    if (/^ .* $/.test(value) && value.trim()) value = value.slice(1, -1);
    return { piece: h("code", { text: value }), next: partner + mark.length };
  }
  if (live && mark.length === 1 && end < text.length) return { piece: h("code", { text: text.slice(end) }), next: text.length };
  return { text: mark, next: end };
}

/** A run of *, _ or ~, with what it may do there: flanking as in CommonMark, and Chinese needs no spaces around it. */
function delimiter(text, i) {
  let end = i;
  while (text[end] === text[i]) end += 1;
  const mark = text[i];
  const before = i === 0 ? " " : text[i - 1];
  const after = end === text.length ? " " : text[end];
  const free = (char) => /\s/.test(char) || PUNCTUATION.test(char) || WIDE.test(char);
  const left = !/\s/.test(after) && (!PUNCTUATION.test(after) || free(before));
  const right = !/\s/.test(before) && (!PUNCTUATION.test(before) || free(after));
  const open = left && (mark !== "_" || !right || free(before));
  const close = right && (mark !== "_" || !left || free(after));
  const usable = mark !== "~" || end - i === 2;
  return { piece: { mark, length: end - i, open: open && usable, close: close && usable }, next: end };
}

function entity(text, i) {
  const match = at(ENTITY, text, i);
  if (!match) return { text: "&", next: i + 1 };
  const point = match[1] ? parseInt(match[1], 10) : match[2] ? parseInt(match[2], 16) : null;
  let value = point === null && Object.hasOwn(ENTITIES, match[3]) ? ENTITIES[match[3]] : undefined;
  if (point > 31 && point <= 0x10ffff && !(point >= 0xd800 && point <= 0xdfff)) value = String.fromCodePoint(point);
  return { text: value ?? match[0], next: i + match[0].length };
}

function angle(text, i) {
  const line = at(BREAK, text, i);
  if (line) return { piece: h("br"), next: i + line[0].length };
  const match = at(ANGLE, text, i);
  const address = match && safeAddress(/^[a-z]+:/i.test(match[1]) ? match[1] : `mailto:${match[1]}`);
  return address ? { piece: anchor(address, match[1]), next: i + match[0].length } : { text: "<", next: i + 1 };
}

function bareLink(text, i) {
  const match = i > 0 && /[\p{L}\p{N}]/u.test(text[i - 1]) && !WIDE.test(text[i - 1]) ? null : at(URL_RUN, text, i);
  if (!match) return { text: "h", next: i + 1 };
  const run = trimAddress(match[0]);
  const address = safeAddress(run);
  return address ? { piece: anchor(address, run), next: i + run.length } : { text: "h", next: i + 1 };
}

/** Takes off what belongs to the sentence and not to the address: final punctuation, a bracket that was not opened inside. */
function trimAddress(run) {
  let end = run.length;
  let spare = 0;
  for (const char of run) spare += char === ")" ? 1 : char === "(" ? -1 : 0;
  for (; end > 0; end -= 1) {
    const char = run[end - 1];
    if (char === ")" && spare > 0) spare -= 1;
    else if (!".,;:!?*_~…".includes(char)) break;
  }
  return run.slice(0, end);
}

function anchor(address, text) {
  return h("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow", text });
}

function closeBracket(text, i, { pieces, brackets }) {
  const opener = brackets.pop();
  const target = opener && !opener.dead && text[i + 1] === "(" ? at(TARGET, text, i + 1) : null;
  if (!target) return { text: "]", next: i + 1 };
  const inner = pieces.splice(opener.index).slice(1);
  const wanted = (target[1] ?? target[2] ?? "").replace(/\\([!-/:-@[-`{-~])/g, "$1");
  const address = safeAddress(wanted);
  const next = i + 1 + target[0].length;
  const label = resolve(inner, false);
  for (const link of label.querySelectorAll("a")) link.replaceWith(...link.childNodes); // a link holds no links
  if (opener.piece.picture) return { piece: picture(address, label.textContent), next };
  if (!address) return { piece: h("span", { class: "dead-link" }, label), next };
  for (const outer of brackets) outer.dead = !outer.piece.picture;
  return { piece: labelled(address, label), next };
}

/** A picture is never loaded, for its address may tell someone that it was read: it is shown as a link with its description. */
function picture(address, alt) {
  const name = say(h("span"), alt ? "link.picture" : "link.picture.bare", { vars: { alt } });
  const node = address?.startsWith("http") ? anchor(address, "") : h("span");
  node.classList.add("picture-link");
  node.append(icon("link"), name);
  return node;
}

/** A link with words of its own; when the words look like another address, the real one is shown beside them. */
function labelled(address, label) {
  const words = label.textContent.trim();
  const node = anchor(address, "");
  node.append(words ? label : document.createTextNode(address));
  const claimed = /^(?:https?:\/\/)?([\p{L}\p{N}-]+(?:\.[\p{L}\p{N}-]+)+)(?:[/:?#]|$)/iu.exec(words);
  const host = address.startsWith("http") ? new URL(address).host : "";
  if (claimed && host && !host.endsWith(claimed[1].toLowerCase())) node.append(h("span", { class: "link-host", text: ` (${host})` }));
  return node;
}

/** Pairs emphasis marks. Frames are opened marks with the nodes that followed them. */
function resolve(pieces, live) {
  const frames = [{ mark: "", length: 0, nodes: [] }];
  for (const piece of pieces) {
    if (typeof piece === "string" || piece.bracket) frames.at(-1).nodes.push(typeof piece === "string" ? piece : piece.text);
    else if (piece.mark === undefined) frames.at(-1).nodes.push(piece);
    else emphasise(frames, piece);
  }
  while (frames.length > 1) {
    const frame = frames.pop();
    if (live && frame.mark === "*" && frame.length === 2 && frame.nodes.length) frames.at(-1).nodes.push(wrap("strong", frame.nodes));
    else give(frames.at(-1), [frame.mark.repeat(frame.length)], frame.nodes);
  }
  const result = document.createDocumentFragment();
  fill(result, frames[0].nodes);
  result.normalize();
  return result;
}

/** Puts nodes and words into a parent; words that follow each other are joined first, for text nodes are joined slowly. */
function fill(parent, nodes) {
  let words = "";
  for (const node of nodes) {
    if (typeof node === "string") {
      words += node;
      continue;
    }
    parent.append(words, node);
    words = "";
  }
  parent.append(words);
  return parent;
}

const wrap = (tag, nodes) => fill(document.createElement(tag), nodes);

/** Appends one by one: spreading a hostile paragraph's nodes over arguments would overflow the stack. */
function give(frame, ...groups) {
  for (const group of groups) for (const node of group) frame.nodes.push(node);
}

function partner(frames, piece, length) {
  for (let i = frames.length - 1; i > 0; i -= 1) {
    const frame = frames[i];
    const odd = (frame.close || piece.open) && (frame.full + piece.length) % 3 === 0 && (frame.full % 3 || piece.length % 3);
    if (frame.mark === piece.mark && !(odd && piece.mark !== "~") && (piece.mark !== "~" || frame.length === length)) return i;
  }
  return 0;
}

function emphasise(frames, piece) {
  let { length } = piece;
  while (piece.close && length > 0) {
    const index = partner(frames, piece, length);
    if (!index) break;
    while (frames.length - 1 > index) {
      const lost = frames.pop();
      give(frames.at(-1), [lost.mark.repeat(lost.length)], lost.nodes);
    }
    const frame = frames[index];
    const used = frame.length >= 2 && length >= 2 ? 2 : 1;
    const node = wrap(piece.mark === "~" ? "del" : used === 2 ? "strong" : "em", frame.nodes);
    frame.length -= used;
    length -= used;
    frame.nodes = [node];
    if (frame.length === 0) give(frames[index - 1], frames.pop().nodes);
  }
  if (length === 0) return;
  if (piece.open && frames.length < DEEPEST) frames.push({ mark: piece.mark, length, full: piece.length, close: piece.close, nodes: [] });
  else frames.at(-1).nodes.push(piece.mark.repeat(length));
}
