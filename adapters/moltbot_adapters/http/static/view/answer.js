// One answer: what was routed and run, the text as it streams, how it ended, and what it cost.

import { h, icon, mark } from "../dom.js";
import { duration, say } from "../i18n.js";
import { MarkdownView } from "../markdown/render.js";
import { copyButton } from "./copy.js";
import { Thoughts } from "./thoughts.js";

const HEAVY_MS = 8; // a drawing that takes longer than this is not repeated in the very next frame

export class AnswerView {
  constructor({ onDrawn = () => undefined, onSettled = () => undefined } = {}) {
    this.onDrawn = onDrawn;
    this.onSettled = onSettled;
    this.text = "";
    this.unschedule = null;
    this.model = "";
    this.tools = new Map();
    this.attached = 0;
    this.resets = 0;
    this.chips = h("div", { class: "chips" });
    this.notices = h("div", { class: "notices", attrs: { role: "status" } });
    this.thoughts = new Thoughts();
    this.prose = h("div", { class: "prose" });
    this.status = h("p", { class: "status", hidden: true });
    this.problem = h("div", { class: "problem-place" });
    this.foot = h("footer", { class: "answer-foot", hidden: true });
    this.markdown = new MarkdownView(this.prose);
    const body = h("div", { class: "answer-body" }, this.chips, this.notices, this.thoughts.node, this.prose, this.status, this.problem, this.foot);
    const name = say(h("h2", { class: "visually-hidden" }), "bot");
    this.node = h("article", { class: "message answer" }, name, h("div", { class: "avatar" }, mark()), body);
  }

  /** An answer from the past. */
  static finished(message) {
    const view = new AnswerView();
    view.text = message.text;
    view.model = message.model ?? "";
    for (const part of message.attachments ?? []) view.attach(part);
    view.#draw(true);
    view.#ending(message.finish_reason);
    view.#footer({ model: view.model });
    return view;
  }

  /** Shows that something is going on while there is nothing to read yet. */
  begin(key = "thinking") {
    this.node.setAttribute("aria-busy", "true");
    this.problem.replaceChildren();
    this.say(key);
  }

  say(key, vars = {}) {
    this.status.hidden = false;
    const dots = h("span", { class: "dots", ariaHidden: "true" }, h("i"), h("i"), h("i"));
    this.status.replaceChildren(dots, say(h("span"), key, { vars }));
  }

  quiet() {
    this.status.hidden = true;
  }

  append(text) {
    this.text += text.replaceAll("\r", "");
    this.quiet();
    this.#schedule();
  }

  /** What was shown is void. */
  replace(text) {
    const before = this.text;
    this.text = text.replaceAll("\r", "");
    this.thoughts.clear();
    if (before.trim() && !this.text.startsWith(before)) this.#restarted();
    if (this.text) this.quiet();
    else this.begin();
    this.#schedule();
  }

  chip(iconName, key, vars = {}, kind = "") {
    const chip = h("span", { class: `chip ${kind}` }, icon(iconName), say(h("span"), key, { vars }));
    this.chips.append(chip);
    return chip;
  }

  /** Says in one line how often the answer was begun anew. */
  #restarted() {
    this.reset?.remove();
    this.resets += 1;
    this.reset = this.notice("retry", "reset", { times: this.resets > 1 ? ` (${this.resets}×)` : "" });
  }

  /** A line about how the answer comes about, such as a switch of the model. */
  notice(iconName, key, vars = {}) {
    const line = h("p", { class: "notice" }, icon(iconName), say(h("span"), key, { vars }));
    this.notices.append(line);
    this.onDrawn();
    return line;
  }

  think(text) {
    if (!this.text && this.thoughts.node.hidden) this.say("thinking"); // it waits in no line any more
    this.thoughts.append(text);
    this.onDrawn();
  }

  /** A part of the answer that is not text and that the page does not show. */
  attach(part) {
    this.attached += 1;
    if (part?.kind === "tool_call") this.chip("tool", "tool.asked", { tool: part.tool });
    else this.chip("clip", "attachment", { name: attachmentName(part) });
  }

  toolStarted({ call_id: id, tool }) {
    this.tools.set(id, { tool, chip: this.chip("tool", "tool.running", { tool }, "running") });
  }

  toolFinished({ call_id: id, tool, is_error: failed, duration_ms: ms }) {
    const known = this.tools.get(id);
    const chip = known?.chip ?? this.chip("tool", "tool.done", { tool, ms });
    chip.className = failed ? "chip failed" : "chip";
    say(chip.lastChild, failed ? "tool.failed" : "tool.done", { vars: { tool: tool || known?.tool, ms: Math.round(ms ?? 0) } });
  }

  /** The turn has ended well or was stopped; `data` is the completed event, or null when the server never said. */
  complete(data, stopped = false) {
    const text = data?.text?.replaceAll("\r", "");
    if (text) this.text = text;
    this.thoughts.whole(data?.reasoning);
    for (const part of data?.attachments?.slice(this.attached) ?? []) this.attach(part); // those that no event told
    this.#end();
    this.#ending(stopped ? "cancelled" : data?.finish_reason);
    this.model = data?.model || this.model;
    this.#footer({ ...data, model: this.model });
  }

  /** Says why there is no more, where that is not plain. */
  #ending(reason) {
    if (reason === "cancelled") this.chipBelow("stop", "stopped");
    else if (reason === "length") this.chipBelow("alert", "end.length");
    else if (reason === "upstream_error") this.chipBelow("alert", "error.partial");
    else if (reason === "joined") this.chipBelow("down", "end.joined");
    else if (reason === "content_filter") this.chipBelow("alert", "end.filter");
    else if (this.text.trim() === "" && this.attached === 0) this.chipBelow("alert", "empty");
  }

  chipBelow(iconName, key) {
    this.problem.append(h("span", { class: "chip ending" }, icon(iconName), say(h("span"), key)));
  }

  /** Shows what went wrong under whatever text is there, with one way on. */
  fail({ key, vars = {}, detail = "", action = "retry", onAction = null }) {
    this.#end();
    const lines = h("div", { class: "problem-text" }, say(h("strong"), this.text ? "error.partial" : "error.title"), say(h("p"), key, { vars }));
    if (detail) lines.append(say(h("p", { class: "problem-detail" }), "error.detail", { vars: { detail } }));
    const bubble = h("div", { class: "problem", attrs: { role: "alert" } }, icon("alert"), lines);
    if (onAction) {
      const button = h("button", { class: "button", on: { click: onAction } }, icon(action === "edit" ? "edit" : "retry"), say(h("span"), action));
      bubble.append(button);
    }
    this.problem.replaceChildren(bubble);
    if (this.text) this.#footer({ model: this.model });
    this.onDrawn();
  }

  #end() {
    this.node.removeAttribute("aria-busy");
    this.quiet();
    this.problem.replaceChildren();
    this.#draw(true);
  }

  #schedule() {
    if (this.unschedule) return;
    const draw = () => this.#draw(false);
    if (document.hidden || this.cost > HEAVY_MS) { // a hidden page gets no frames; a slow one gets breathing space
      const timer = setTimeout(draw, document.hidden ? 300 : this.cost * 3);
      this.unschedule = () => clearTimeout(timer);
    } else {
      const frame = requestAnimationFrame(draw);
      this.unschedule = () => cancelAnimationFrame(frame);
    }
  }

  #draw(done) {
    this.unschedule?.();
    this.unschedule = null;
    const start = performance.now();
    const fresh = this.markdown.update(this.text, done);
    this.cost = performance.now() - start;
    this.prose.classList.toggle("streaming", !done && this.text !== "");
    if (fresh.length) this.onSettled(fresh);
    this.onDrawn();
  }

  #footer({ model = "", usage, timings, finish_reason: reason, cached }) {
    const copy = copyButton("copy.answer", () => this.text);
    const meta = h("span", { class: "meta" });
    const facts = [];
    if (model) facts.push(["meta.model", () => ({ model })]);
    if (cached) facts.push(["meta.cached", () => ({})]);
    if (timings?.first_token_ms != null && reason && this.text) facts.push(["meta.first", () => ({ time: duration(timings.first_token_ms) })]);
    if (timings?.total_ms != null) facts.push(["meta.total", () => ({ time: duration(timings.total_ms) })]);
    if (usage?.output_tokens) facts.push(["meta.tokens", () => ({ input: usage.input_tokens, output: usage.output_tokens })]);
    if (timings?.trimmed_messages) facts.push(["meta.trimmed", () => ({ n: timings.trimmed_messages })]);
    for (const [key, vars] of facts) meta.append(say(h("span"), key, { vars: vars() }));
    this.foot.replaceChildren(...(this.text ? [copy] : []), meta);
    this.foot.hidden = !this.text && facts.length === 0;
  }
}

/** What the person wrote. */
export function questionView(text) {
  const bubble = h("div", { class: "bubble", dir: "auto", text });
  return h("article", { class: "message question" }, say(h("h2", { class: "visually-hidden" }), "you"), bubble);
}

/** The words for an attachment that the page does not show. */
export const attachmentName = (part = {}) => part.filename || part.alt_text || part.media_type || part.kind || "?";
