// Conversations in IndexedDB, on this machine only. A conversation is {id, title, changed, messages}.

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("kilotok", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function run(mode, work) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("conversations", mode);
    const request = work(transaction.objectStore("conversations"));
    transaction.oncomplete = () => { database.close(); resolve(request.result); };
    transaction.onabort = transaction.onerror = () => { database.close(); reject(transaction.error); };
  });
}

export async function all() {
  const list = await run("readonly", (store) => store.getAll());
  return list.sort((a, b) => b.changed - a.changed);
}

export const save = (conversation) =>
  run("readwrite", (store) => store.put({ ...conversation, changed: Date.now() }));

export const remove = (id) => run("readwrite", (store) => store.delete(id));

export function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", changed: 0, messages: [] };
}

// Takes only what has the shape of conversations; everything else in the file is left out.
export function parse(text) {
  const list = JSON.parse(text);
  if (!Array.isArray(list)) throw new Error("expected a list of conversations");
  const message = (m) => m && ["user", "assistant"].includes(m.role) && typeof m.content === "string";
  return list
    .filter((c) => c && Array.isArray(c.messages) && c.messages.every(message))
    .map((c) => ({ ...fresh(), title: String(c.title ?? "").slice(0, 80), messages: c.messages }));
}
