// What the tokenizer knows of each language. Kinds: k keyword, s string, c comment, n number, f function, t type, b built-in or
// literal, a attribute or key, o operator, i inserted, d deleted, m mark. Every pattern is sticky and linear.

const words = (text) => new Set(text.split(" "));
const NUMBER = /(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d[\d_]*)?(?:[eE][+-]?\d+)?)[a-zA-Z%]*/y;
const DOUBLE = /"(?:[^"\\]|\\.)*"?/y;
const SINGLE = /'(?:[^'\\]|\\.)*'?/y;
const OPERATOR = /[-+*/%=<>!&|^~?:]+/y;
const SPACE = /\s+/y;

/** Colours a word by the sets it is in, else as a function when a bracket follows, else as a type when it starts big. */
function namer({ keywords, builtins = words(""), anyCase = false }) {
  return (word, line, at) => {
    const key = anyCase ? word.toLowerCase() : word;
    if (keywords.has(key)) return "k";
    if (builtins.has(key)) return "b";
    if (line[at + word.length] === "(") return "f";
    return !anyCase && /^[A-Z][\w$]*[a-z]/.test(word) ? "t" : "";
  };
}

/** A block comment or long string: rules to enter it, and the state that it is. */
function until(end, kind, back = "") {
  return { rules: [[end, kind, back]], otherwise: kind };
}

/** Languages with the braces of C: // and block comments, quoted strings. */
function braces(keywords, { builtins = "", strings = [DOUBLE, SINGLE], first = [], states = {} } = {}) {
  const name = namer({ keywords: words(keywords), builtins: words(builtins) });
  return {
    "": {
      rules: [
        [SPACE, ""], [/\/\/.*/y, "c"], [/\/\*/y, "c", "comment"], ...first, ...strings.map((pattern) => [pattern, "s"]),
        [/[\p{L}_$][\p{L}\p{N}_$]*/uy, name], [NUMBER, "n"], [OPERATOR, "o"],
      ],
    },
    comment: until(/\*\//y, "c"),
    ...states,
  };
}

const python = {
  "": {
    rules: [
      [SPACE, ""], [/#.*/y, "c"], [/>>>|\.\.\.(?= )/y, "m"], [/[rbfuRBFU]{0,2}"""/y, "s", "double"], [/[rbfuRBFU]{0,2}'''/y, "s", "single"],
      [/[rbfuRBFU]{0,2}"(?:[^"\\]|\\.)*"?/y, "s"], [/[rbfuRBFU]{0,2}'(?:[^'\\]|\\.)*'?/y, "s"], [/@[\w.]+/y, "a"],
      [/[\p{L}_][\p{L}\p{N}_]*/uy, namer({
        keywords: words("and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield"),
        builtins: words("True False None self cls int str float bool bytes list dict set tuple object print len range open super isinstance enumerate zip sorted"),
      })],
      [NUMBER, "n"], [OPERATOR, "o"],
    ],
  },
  double: until(/"""/y, "s"),
  single: until(/'''/y, "s"),
};

const javascript = braces(
  "abstract as async await break case catch class const continue declare default delete do else enum export extends finally for from function get if implements import in instanceof interface keyof let namespace new of private protected public readonly return set static switch throw try type typeof var void while yield",
  {
    builtins: "true false null undefined this super console window document string number boolean any unknown never module require",
    first: [[/`/y, "s", "template"], [/@\w+/y, "a"], [/\/(?![*/\s])(?:[^/\\[\n]|\\.|\[(?:[^\]\\\n]|\\.)*\])+\/[dgimsuvy]*(?=[\s,;.)\]]|$)/y, "s"]],
    states: { template: { rules: [[/`/y, "s", ""], [/\\./y, "s"]], otherwise: "s" } },
  },
);

const bash = {
  "": {
    rules: [
      [SPACE, ""], [/#.*/y, (text, line, at) => (at === 0 || /\s/.test(line[at - 1]) ? "c" : "")], [/\$ (?=\S)/y, (text, line, at) => (at === 0 ? "m" : "")],
      [/"(?:[^"\\]|\\.)*"?/y, "s"], [/'[^']*'?/y, "s"], [/\$\{[^}]*\}?|\$[\w@#?*!$-]/y, "b"], [/-{1,2}[A-Za-z][\w-]*/y, "a"], [/[A-Za-z_]\w*(?==)/y, "b"],
      [/[\w./@:-]+/y, (word, line, at) => {
        if (/^(?:if|then|else|elif|fi|for|in|do|done|while|until|case|esac|function|return|local|export|set|source|exit|FROM|RUN|COPY|CMD|ENV|WORKDIR)$/.test(word)) return "k";
        return /(?:^|[|;&(]|\b(?:then|do|sudo))\s*(?:\$ )?$/.test(line.slice(Math.max(0, at - 40), at)) ? "f" : "";
      }],
      [/[|&;<>]+/y, "o"],
    ],
  },
};

const json = {
  "": {
    rules: [
      [SPACE, ""], [/"(?:[^"\\]|\\.)*"?/y, (text, line, at) => (/^\s*:/.test(line.slice(at + text.length, at + text.length + 20)) ? "a" : "s")],
      [/\/\/.*/y, "c"], [/\b(?:true|false|null)\b/y, "b"], [/-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/y, "n"],
    ],
  },
};

const yaml = {
  "": {
    rules: [
      [/#.*/y, (text, line, at) => (at === 0 || /\s/.test(line[at - 1]) ? "c" : "")], [SPACE, ""], [/---|\.\.\./y, "m"], [/-(?= )/y, "o"],
      [/[\w./"'$-]+(?=\s{0,9}:(?:\s|$))/y, "a"], [DOUBLE, "s"], [/'[^']*'?/y, "s"], [/[&*!][\w!-]+/y, "t"], [/(?:true|false|null|yes|no|on|off)(?=\s*(?:#|,|\]|\}|$))/y, "b"],
      [/-?\d[\d_.]*(?=\s*(?:#|,|\]|\}|$))/y, "n"], [/[>|][-+]?(?=\s*$)/y, "o"], [/[^\s#,[\]{}:]+/y, ""],
    ],
  },
};

const ini = {
  "": {
    rules: [
      [SPACE, ""], [/[#;].*/y, "c"], [/\[\[?[^\]]*\]?\]/y, (text, line, at) => (at === 0 ? "t" : "")], [/[\w.-]+(?=\s{0,9}=)/y, "a"], [DOUBLE, "s"], [SINGLE, "s"],
      [/\b(?:true|false)\b/y, "b"], [NUMBER, "n"], [/=/y, "o"], [/[^\s#"'=,[\]]+/y, ""],
    ],
  },
};

const sql = {
  "": {
    rules: [
      [SPACE, ""], [/--.*/y, "c"], [/\/\*/y, "c", "comment"], [/'(?:[^']|'')*'?/y, "s"], [/"[^"]*"?|`[^`]*`?/y, "a"],
      [/[\p{L}_][\p{L}\p{N}_]*/uy, namer({
        anyCase: true,
        keywords: words("select from where and or not in is as on join left right inner outer full cross group by order having limit offset insert into values update set delete create table index view drop alter add column primary key foreign references unique default union all distinct case when then else end exists between like with returning begin commit rollback if using over partition asc desc"),
        builtins: words("null true false integer int bigint text varchar boolean real numeric date timestamp blob json"),
      })],
      [NUMBER, "n"], [OPERATOR, "o"],
    ],
  },
  comment: until(/\*\//y, "c"),
};

const html = {
  "": { rules: [[/[^<&]+/y, ""], [/<!--/y, "c", "comment"], [/<!\w[^>]*>?/y, "m"], [/<\/?[\w:-]+/y, "k", "tag"], [/&[#\w]+;/y, "b"]] },
  comment: until(/-->/y, "c"),
  tag: { rules: [[SPACE, ""], [/\/?>/y, "k", ""], [/[\w:@.-]+(?=\s{0,9}=)/y, "a"], [/"[^"]*"?|'[^']*'?/y, "s"], [/[\w:@.-]+/y, "a"], [/=/y, "o"]] },
};

const css = {
  "": {
    rules: [
      [SPACE, ""], [/\/\*/y, "c", "comment"], [/\/\/.*/y, "c"], [/@[\w-]+/y, "k"], [DOUBLE, "s"], [SINGLE, "s"], [/--[\w-]+/y, "b"], [/#[\da-fA-F]{3,8}\b/y, "n"],
      [/[\w-]+(?=\s{0,9}:\s)/y, "a"], [/[.#][A-Za-z][\w-]*/y, "t"], [/::?[\w-]+/y, "f"], [/[\w-]+(?=\()/y, "f"], [NUMBER, "n"], [/!important/y, "k"], [/[A-Za-z][\w-]*/y, ""],
    ],
  },
  comment: until(/\*\//y, "c"),
};

const diff = {
  "": {
    rules: [
      [/(?:diff |index |\+\+\+ |--- ).*/y, (text, line, at) => (at === 0 ? "m" : "")], [/@@.*/y, (text, line, at) => (at === 0 ? "f" : "")],
      [/\+.*/y, (text, line, at) => (at === 0 ? "i" : "")], [/-.*/y, (text, line, at) => (at === 0 ? "d" : "")], [/.+/y, ""],
    ],
  },
};

export const GRAMMARS = {
  python, javascript, bash, json, yaml, ini, sql, html, css, diff,
  go: braces("break case chan const continue default defer else fallthrough for func go goto if import interface map package range return select struct switch type var", {
    builtins: "true false nil iota any bool byte error string int int32 int64 uint uint32 uint64 float64 rune make new len cap append copy delete panic",
    first: [[/`/y, "s", "raw"]], states: { raw: until(/`/y, "s") },
  }),
  java: braces("abstract assert break case catch class const continue default do else enum extends final finally for fun if implements import instanceof interface internal namespace new object override package private protected public record return sealed static super switch synchronized this throw throws try using val var void volatile when while", {
    builtins: "true false null boolean byte char double float int long short String Integer Long List Map Set", first: [[/"""/y, "s", "text"], [/@\w+/y, "a"]], states: { text: until(/"""/y, "s") },
  }),
  c: braces("auto break case catch class concept const constexpr continue co_await co_return co_yield decltype default delete do else enum explicit extern final for friend goto if inline mutable namespace new noexcept operator override private protected public requires return sizeof static static_assert static_cast struct switch template this throw try typedef typename union using virtual volatile while", {
    builtins: "true false nullptr NULL bool char double float int long short signed unsigned void size_t int32_t int64_t uint8_t uint32_t uint64_t std string vector",
    first: [[/#\s{0,9}\w+/y, (text, line, at) => (line.slice(0, at).trim() ? "" : "m")], [/<[\w./]+>/y, (text, line) => (line.trimStart().startsWith("#") ? "s" : "")]],
  }),
  rust: braces("as async await break const continue crate dyn else enum extern fn for if impl in let loop match mod move mut pub ref return static struct super trait type unsafe use where while", {
    builtins: "true false self Self bool char str u8 u16 u32 u64 usize i32 i64 f32 f64 String Vec Option Result Some None Ok Err Box",
    strings: [DOUBLE, /'(?:[^'\\]|\\.)'/y], first: [[/#!?\[[^\]]*\]/y, "a"], [/'[a-z_]\w*(?!')/y, "t"], [/\w+!(?=[([{\s])/y, "f"]],
  }),
  proto: braces("syntax package import option message enum service rpc returns stream oneof map repeated optional reserved", {
    builtins: "true false double float int32 int64 uint32 uint64 bool string bytes",
  }),
};
