"use strict";

// Shows the description of the API. With keys, it is read with the one that the reader enters, and so are the requests
// that the page sends.
const form = document.getElementById("ask");

async function show(key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch("openapi.json", { headers });
  if (!answer.ok) {
    const refusal = await answer.json();
    form.hidden = false;
    document.getElementById("problem").textContent = key || answer.status !== 401 ? refusal.detail : "";
    return;
  }
  form.hidden = true;
  const ui = SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
    onComplete: () => key && ui.preauthorizeApiKey("bearer", key),
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show(document.getElementById("key").value);
});
show("");
