// Reads Server-Sent Events from a fetch body (EventSource can neither POST nor send headers).

/** Yields {id, event, data} for each frame; `onBytes` is called for every chunk, so that pings count as life. */
export async function* readEvents(body, onBytes) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // keeps characters that a chunk cuts in two
  let buffer = "";
  let frame = { id: "", event: "", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an unfinished frame is dropped: the stream resumes after the last whole one
      onBytes?.();
      buffer += decoder.decode(value, { stream: true });
      const held = buffer.endsWith("\r") ? "\r" : ""; // may be half of \r\n
      const lines = buffer.slice(0, buffer.length - held.length).split(/\r\n|\n|\r/);
      buffer = lines.pop() + held;
      for (const line of lines) {
        if (line !== "") {
          readField(line, frame);
          continue;
        }
        if (frame.data.length) yield { id: frame.id, event: frame.event || "message", data: frame.data.join("\n") };
        frame = { id: "", event: "", data: [] };
      }
    }
  } finally {
    reader.cancel().catch(() => undefined); // the connection is already gone: nothing is left to cancel
  }
}

function readField(line, frame) {
  const colon = line.indexOf(":");
  if (colon === 0) return; // a comment
  const name = colon < 0 ? line : line.slice(0, colon);
  let value = colon < 0 ? "" : line.slice(colon + 1);
  if (value.startsWith(" ")) value = value.slice(1);
  if (name === "data") frame.data.push(value);
  else if (name === "id") frame.id = value;
  else if (name === "event") frame.event = value;
}
