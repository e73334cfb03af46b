"use strict";
// One switch at a time of the samples; without this script all of them are there.
for (const chooser of document.querySelectorAll("select[data-of]")) {
  const parts = document.querySelectorAll(`[data-part="${chooser.dataset.of}"]`);
  const show = () => parts.forEach((part) => { part.hidden = part.dataset.choice !== chooser.value; });
  chooser.closest("label").hidden = false;
  chooser.addEventListener("change", show);
  show();
}
