// How a turn of the conversation looks.

import { show } from "./text.js";

/** A new element with text or elements in it. */
export function element(tag, className, ...inside) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...inside);
  return made;
}

export function button(label, press) {
  const made = element("button", "", label);
  made.type = "button";
  made.addEventListener("click", press);
  return made;
}

/** What the user asked, with a way to ask it otherwise. */
export function userTurn(turn, edit) {
  return element("section", "turn user", element("div", "text", turn.content), element("div", "more", button("Edit", edit)));
}

/** An answer that can be shown again while it grows. */
export class AnswerTurn {
  constructor(turn, retry) {
    this.turn = turn;
    this.retry = retry;
    this.summary = element("summary");
    this.thought = element("div", "text");
    this.folded = element("details", "thought", this.summary, this.thought);
    this.text = element("div", "text");
    this.more = element("div", "more");
    this.element = element("section", "turn answer", this.text, this.more);
    this.cost = 0;
    this.due = 0;
  }

  /** Shows what there is, no more often than showing it takes time. */
  grow() {
    const now = performance.now();
    if (now < this.due) return;
    this.show(true);
    this.cost = performance.now() - now;
    this.due = now + Math.max(60, 8 * this.cost);
  }

  show(growing) {
    const { turn } = this;
    const thinking = growing && !turn.content;
    this.element.setAttribute("aria-busy", String(growing));
    if (turn.thought) {
      if (!this.folded.isConnected) this.element.prepend(this.folded);
      this.summary.textContent = thought(turn, thinking);
      show(this.thought, turn.thought);
      if (thinking) this.thought.scrollTop = this.thought.scrollHeight;
    }
    show(this.text, turn.content);
    this.text.classList.toggle("waiting", thinking);
    if (growing) return;
    const failed = turn.failed ? [element("span", "failed", turn.failed)] : [];
    const copy = turn.content ? [button("Copy", () => navigator.clipboard.writeText(turn.content))] : [];
    this.more.replaceChildren(...failed, button("Retry", this.retry), ...copy, figures(turn));
  }
}

function thought(turn, thinking) {
  const seconds = `${(turn.thoughtMs / 1000).toFixed(1)} s`;
  if (thinking) return `Thinking, ${seconds}`;
  const tokens = turn.usage?.completion_tokens_details?.reasoning_tokens;
  return `Thought for ${seconds}${tokens ? `, ${tokens} tokens` : ""}`;
}

// Tokens a second count from the first token: what came before it is the time to first token.
function figures(turn) {
  const parts = [];
  const { usage, firstMs, wholeMs } = turn;
  if (turn.finish === "length") parts.push("cut at the limit of tokens");
  if (turn.stopped) parts.push("stopped");
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (usage && wholeMs > firstMs && usage.completion_tokens > 1) {
    parts.push(`${((1000 * (usage.completion_tokens - 1)) / (wholeMs - firstMs)).toFixed(1)} tokens/s`);
  }
  if (firstMs) parts.push(`first after ${(firstMs / 1000).toFixed(2)} s`);
  const drafts = usage?.completion_tokens_details;
  const tried = (drafts?.accepted_prediction_tokens ?? 0) + (drafts?.rejected_prediction_tokens ?? 0);
  if (tried) parts.push(`${Math.round((100 * drafts.accepted_prediction_tokens) / tried)} % of drafts accepted`);
  return element("span", "", parts.join(" · "));
}
