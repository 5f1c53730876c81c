// A job's events as they happen; when the job ends, the page is loaded again with its plans.
"use strict";

const card = document.querySelector("[data-job]");
const list = document.querySelector("[data-events]");
const source = new EventSource(`/v1/jobs/${card.dataset.job}/events`);
const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(2)} GiB`;

const outcomes = { fits: "fits", oom: "runs out of memory", failed: "failed" };

const sentences = {
  note: (data) => data.text,
  state: (data) => (data.cancel_requested && data.state === "running" ? "cancellation requested" : data.state),
  variant_started: (data) => `${data.label}: started`,
  trial_started: (data) => `${data.label}: running batch size ${data.batch_size}`,
  trial_finished: (data) => {
    const reserved = data.trial.peak_reserved_bytes;
    const result = `${data.label}: batch size ${data.trial.batch_size} ${outcomes[data.trial.outcome]}`;
    const size = data.trial.outcome === "fits" && reserved ? `, ${gib(reserved)} reserved` : "";
    return `${result}${size}${data.trial.source === "predicted" ? ", predicted" : ""}`;
  },
  variant_finished: (data) => `${data.label}: ${data.plan.status}`,
};

function show(kind, event) {
  const data = JSON.parse(event.data);
  const item = document.createElement("li");
  const time = document.createElement("time");
  time.dateTime = data.at;
  time.textContent = data.at.slice(11, 19);
  item.append(time, sentences[kind](data));
  list.append(item);
  if (kind === "state" && ["succeeded", "failed", "cancelled"].includes(data.state)) {
    source.close();
    if (card.dataset.final === "no") location.reload();
  }
}

for (const kind of Object.keys(sentences)) source.addEventListener(kind, (event) => show(kind, event));
