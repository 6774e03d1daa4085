// Asking the service; a page without the key asks for it once.

export class KeyWanted extends Error {}

export async function ask(path, parameters = {}) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined));
  const answer = await fetch(query.size ? `${path}?${query}` : path);
  if (answer.status === 401) throw new KeyWanted();
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error.message);
  return body;
}

export async function giveKey(key) {
  const answer = await fetch("/key", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ key }) });
  return answer.ok;
}
