// A small tokenizer for colours: rules per state, one line at a time, so that a streaming block never starts over.

import { GRAMMARS } from "./grammars.js";

const LONGEST_LINE = 2_000; // longer lines (minified code, data) stay plain

const ALIASES = {
  py: "python", python3: "python", pycon: "python", js: "javascript", jsx: "javascript", mjs: "javascript", cjs: "javascript", node: "javascript",
  ts: "javascript", tsx: "javascript", typescript: "javascript", golang: "go", "c++": "c", cpp: "c", cc: "c", h: "c", hpp: "c", cxx: "c", objc: "c",
  rs: "rust", sh: "bash", shell: "bash", zsh: "bash", console: "bash", dockerfile: "bash", make: "bash", makefile: "bash", env: "ini", toml: "ini",
  jsonc: "json", json5: "json", yml: "yaml", mysql: "sql", postgresql: "sql", postgres: "sql", sqlite: "sql", xml: "html", svg: "html", vue: "html",
  scss: "css", less: "css", patch: "diff", protobuf: "proto", kotlin: "java", kt: "java", csharp: "java", cs: "java", scala: "java", swift: "java",
};

/** The grammar for the name on a fence, or null for plain text. */
export function languageOf(name) {
  const known = Object.hasOwn(GRAMMARS, name) ? name : ALIASES[name];
  return typeof known === "string" ? GRAMMARS[known] : null;
}

/**
 * Cuts one line into [kind, text] tokens (kind "" is plain). `state` is what the line before left open, "" at the start.
 * A rule is [pattern, kind or function of the match, next state]; the first that matches at the place wins.
 */
export function tokenizeLine(grammar, line, state) {
  if (!grammar || line.length > LONGEST_LINE) return { tokens: [["", line]], state };
  const tokens = [];
  let mode = grammar[state] ? state : "";
  let at = 0;
  const add = (kind, text) => {
    if (tokens.length && tokens.at(-1)[0] === kind) tokens.at(-1)[1] += text;
    else if (text) tokens.push([kind, text]);
  };
  while (at < line.length) {
    const rest = grammar[mode];
    let taken = false;
    for (const [pattern, kind, next] of rest.rules) {
      pattern.lastIndex = at;
      const match = pattern.exec(line);
      if (!match || match[0] === "") continue;
      add(typeof kind === "function" ? kind(match[0], line, at) : kind, match[0]);
      at += match[0].length;
      if (next !== undefined) mode = next;
      taken = true;
      break;
    }
    if (taken) continue;
    add(rest.otherwise ?? "", line[at]);
    at += 1;
  }
  return { tokens, state: grammar[mode].atLineEnd ?? mode };
}
