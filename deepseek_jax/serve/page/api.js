// The server's API as this page asks it. Paths are relative, so that it also works behind a prefix.

/** What the server serves: its first model's name, and its version. */
export async function served(key) {
  const answer = await asked("v1/models", { headers: headers(key) });
  const models = await answer.json();
  const version = await fetch("version").then((of) => (of.ok ? of.json() : {}), () => ({}));
  return { model: models.data[0].id, version: version.version ?? "" };
}

/** Events of one answer, as the server sends them. */
export async function* answers(body, key, signal) {
  const answer = await asked("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of dataLines(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    yield event;
  }
  throw new Error("the connection ended before the answer did");
}

async function* dataLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

async function asked(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Error("the server cannot be reached");
  }
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => ({}));
  const wait = answer.headers.get("Retry-After");
  const said = found.error?.message ?? `the server answered ${answer.status}`;
  const problem = new Error(wait ? `${said} (again in ${wait} s)` : said);
  problem.status = answer.status;
  throw problem;
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}
