// Markdown with LaTeX as nodes of the page. A model's output is hostile: HTML in it stays text, what markdown-it makes is
// cleaned once more by DOMPurify, pictures are never fetched, and KaTeX is given no macros that reach outside.

const CLEAN = { RETURN_DOM_FRAGMENT: true, FORBID_TAGS: ["style", "form", "input", "img", "svg", "math"], FORBID_ATTR: ["style", "id"] };
const TEX = { throwOnError: false, trust: false, strict: false, maxSize: 20, maxExpand: 200 };
const PAIRS = [["\\[", "\\]", true], ["\\(", "\\)", false], ["$$", "$$", true]];

const markdown = window.markdownit({ html: false, linkify: true, breaks: false }).disable("image");
markdown.inline.ruler.before("escape", "math", inlineMath);
markdown.block.ruler.before("fence", "math", blockMath, { alt: ["paragraph", "reference", "blockquote", "list"] });
markdown.renderer.rules.math = (tokens, at) => {
  const shown = tokens[at].block ? ' data-display="yes"' : "";
  return `<span class="math"${shown}>${markdown.utils.escapeHtml(tokens[at].content)}</span>`;
};

/** Replaces what an element holds by a rendered text. */
export function show(element, text) {
  const made = window.DOMPurify.sanitize(markdown.render(text), CLEAN);
  for (const link of made.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const span of made.querySelectorAll("span.math")) {
    window.katex.render(span.textContent, span, { ...TEX, displayMode: "display" in span.dataset });
  }
  for (const block of made.querySelectorAll("pre")) block.append(copyButton(block.textContent));
  element.replaceChildren(made);
}

function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  });
  return button;
}

function inlineMath(state, silent) {
  const { src, pos } = state;
  const found = PAIRS.find(([open]) => src.startsWith(open, pos)) ?? (src[pos] === "$" ? ["$", "$", false] : null);
  if (!found) return false;
  const [open, close, display] = found;
  const start = pos + open.length;
  const end = src.indexOf(close, start);
  if (end <= start || (open === "$" && !isMath(src, start, end))) return false;
  if (!silent) push(state, src.slice(start, end), display);
  state.pos = end + close.length;
  return true;
}

// As pandoc tells sums of money from formulas: no blank within the dollars, no digit after them.
function isMath(src, start, end) {
  return !/\s/.test(src[start]) && !/\s/.test(src[end - 1]) && !/\d/.test(src[end + 1] ?? "");
}

function blockMath(state, first, last, silent) {
  const begin = state.bMarks[first] + state.tShift[first];
  const found = PAIRS.find(([open, , display]) => display && state.src.startsWith(open, begin));
  if (!found || state.sCount[first] - state.blkIndent >= 4) return false;
  const [open, close] = found;
  for (let line = first; line < last; line++) {
    const from = line === first ? begin + open.length : state.bMarks[line] + state.tShift[line];
    const text = state.src.slice(from, state.eMarks[line]).trimEnd();
    if (line > first && state.sCount[line] < state.blkIndent && text) return false;
    if (!text.endsWith(close)) continue;
    if (silent) return true;
    const whole = state.src.slice(begin + open.length, state.src.lastIndexOf(close, state.eMarks[line]));
    push(state, whole, true);
    state.line = line + 1;
    return true;
  }
  return false;
}

function push(state, content, display) {
  const token = state.push("math", "", 0);
  token.content = content.trim();
  token.block = display;
}
