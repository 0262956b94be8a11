// The chat page: a conversation with the server that serves it.

import { answers, served } from "./api.js";
import { DEFAULTS, body, exported, keep, load } from "./kept.js";
import { AnswerTurn, element, userTurn } from "./turns.js";

const of = (id) => document.getElementById(id);
const log = of("log"), question = of("question"), send = of("send"), dialog = of("settings");
const state = { ...load(), model: "", running: null };

function say(text) {
  of("status").textContent = text;
}

function save() {
  if (!keep(state)) say("This browser keeps nothing: export the conversation to save it.");
}

async function greet() {
  try {
    const found = await served(state.key);
    state.model = found.model;
    of("model").textContent = document.title = found.model;
    of("version").textContent = found.version && `deepseek_jax ${found.version}`;
    say("");
  } catch (problem) {
    say(problem.status === 401 ? "This server wants an API key: give it in the settings." : problem.message);
  }
}

// --- the conversation ------------------------------------------------------------------------------

function draw() {
  log.replaceChildren(...state.turns.map((turn, place) => {
    if (turn.role === "user") return userTurn(turn, () => edit(place));
    const answer = new AnswerTurn(turn, () => retry(place));
    answer.show(false);
    return answer.element;
  }));
  if (!state.turns.length) log.append(element("p", "empty", "Ask a question. The model's thoughts can be unfolded above its answer."));
  log.scrollTop = log.scrollHeight;
}

function edit(place) {
  stop();
  question.value = state.turns[place].content;
  state.turns.length = place;
  save();
  draw();
  fit();
  question.focus();
}

function retry(place) {
  stop();
  state.turns.length = place;
  answer();
}

function stop() {
  state.running?.abort();
  state.running = null;
  working(false);
}

// A reader at the end stays there while the answer grows; one who has scrolled up is left where they are.
function following(change) {
  const below = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  change();
  if (below) log.scrollTop = log.scrollHeight;
}

async function answer() {
  if (!state.model) await greet();
  const asked = body(state.model, state.turns, state.settings);
  const turn = { role: "assistant", content: "", thought: "", thoughtMs: 0, firstMs: 0, wholeMs: 0 };
  state.turns.push(turn);
  draw();
  const shown = new AnswerTurn(turn, () => retry(state.turns.indexOf(turn)));
  shown.show(true);
  log.lastElementChild.replaceWith(shown.element);
  const running = (state.running = new AbortController());
  working(true);
  const start = performance.now();
  try {
    for await (const event of answers(asked, state.key, running.signal)) {
      take(turn, event, performance.now() - start);
      following(() => shown.grow());
    }
  } catch (problem) {
    if (problem.name === "AbortError") turn.stopped = true;
    else turn.failed = problem.message;
  }
  turn.wholeMs ||= performance.now() - start;
  following(() => shown.show(false));
  if (state.running === running) {
    state.running = null;
    working(false);
  }
  if (state.turns.includes(turn)) save();
}

function take(turn, event, ms) {
  const [choice] = event.choices ?? [];
  const thought = choice?.delta?.reasoning_content ?? "", content = choice?.delta?.content ?? "";
  if (thought || content) {
    turn.firstMs ||= ms;
    turn.wholeMs = ms;
  }
  if (thought) turn.thoughtMs = ms;
  turn.thought += thought;
  turn.content += content;
  if (choice?.finish_reason) turn.finish = choice.finish_reason;
  if (event.usage) turn.usage = event.usage;
}

function working(yes) {
  send.textContent = yes ? "Stop" : "Send";
  say(yes ? "Answering; Escape stops it." : "");
}

// --- what the user does ----------------------------------------------------------------------------

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

of("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) return stop();
  const content = question.value.trim();
  if (!content) return;
  question.value = "";
  fit();
  state.turns.push({ role: "user", content });
  save();
  answer();
});
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.running) of("ask").requestSubmit();
  }
});

function begin() {
  stop();
  state.turns.length = 0;
  save();
  draw();
  question.focus();
}

of("new").addEventListener("click", begin);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !dialog.open) stop();
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) {
    event.preventDefault();
    begin();
  }
});

of("export").addEventListener("click", () => {
  const file = new Blob([exported(state.model, state.turns)], { type: "text/markdown" });
  const link = element("a");
  link.href = URL.createObjectURL(file);
  link.download = `conversation-${new Date().toISOString().slice(0, 16).replace(":", "-")}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
});

// --- settings --------------------------------------------------------------------------------------

const fields = dialog.querySelector("form").elements;

function fill() {
  for (const name of Object.keys(DEFAULTS)) fields[name].value = state.settings[name];
  fields.key.value = state.key;
}

of("open-settings").addEventListener("click", () => {
  fill();
  dialog.showModal();
});
of("defaults").addEventListener("click", () => {
  state.settings = { ...DEFAULTS };
  fill();
});
dialog.addEventListener("close", () => {
  for (const name of Object.keys(DEFAULTS)) state.settings[name] = fields[name].value;
  state.key = fields.key.value;
  save();
  paint();
  greet();
});

function paint() {
  if (state.settings.theme) document.documentElement.dataset.theme = state.settings.theme;
  else delete document.documentElement.dataset.theme;
}

paint();
draw();
greet();
