// What the browser keeps: the conversation and the settings; the API key until the tab is closed.

const PLACE = "deepseek_jax.chat";
export const DEFAULTS = { system: "", temperature: "", top_p: "", max_tokens: "", seed: "", thinking: "", theme: "" };

/** The conversation and settings of the last time; anything else than these is left aside. */
export function load() {
  let found = {};
  try {
    found = JSON.parse(localStorage.getItem(PLACE)) ?? {};
  } catch {
    // a store that is closed or holds something else is an empty one
  }
  const turns = Array.isArray(found.turns) ? found.turns.filter((turn) => typeof turn?.content === "string") : [];
  const settings = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) {
    if (typeof found.settings?.[name] === "string") settings[name] = found.settings[name];
  }
  return { turns, settings, key: sessionStorage.getItem(PLACE) ?? "" };
}

/** Whether it could be kept. */
export function keep({ turns, settings, key }) {
  try {
    localStorage.setItem(PLACE, JSON.stringify({ turns, settings }));
    sessionStorage.setItem(PLACE, key);
    return true;
  } catch {
    return false;
  }
}

/** A request's body of a conversation: thoughts are no part of its history. */
export function body(model, turns, settings) {
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const asked = { model, messages };
  for (const name of ["temperature", "top_p", "seed"]) if (settings[name] !== "") asked[name] = Number(settings[name]);
  if (settings.max_tokens !== "") asked.max_completion_tokens = Number(settings.max_tokens);
  if (settings.thinking === "disabled") asked.thinking = { type: "disabled" };
  else if (settings.thinking) asked.reasoning_effort = settings.thinking;
  return asked;
}

/** The conversation as Markdown, to be saved. */
export function exported(model, turns) {
  const parts = turns.map((turn) => {
    const thought = turn.thought ? `<details><summary>Thought</summary>\n\n${turn.thought}\n\n</details>\n\n` : "";
    return `## ${turn.role === "user" ? "User" : model}\n\n${thought}${turn.content}\n`;
  });
  return `# Conversation with ${model}\n\n${parts.join("\n")}`;
}
