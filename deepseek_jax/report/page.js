"use strict";
const box = document.getElementById("find"), told = document.getElementById("found");
const groups = [...document.querySelectorAll("details.group")];
const holds = (element, text) => element.textContent.toLowerCase().includes(text);
box.addEventListener("input", () => {
  const text = box.value.trim().toLowerCase();
  let found = 0;
  for (const group of groups) {
    const whole = holds(group.querySelector(".asked"), text);
    let any = false;
    for (const row of group.querySelectorAll("tbody tr")) {
      row.hidden = !(whole || holds(row, text));
      any = any || !row.hidden;
      found += row.hidden ? 0 : 1;
    }
    group.hidden = !any;
    group.open = text !== "" && any;
  }
  told.textContent = text === "" ? "" : found + " found";
});
document.getElementById("expand").addEventListener("click", () => {
  const open = groups.some((group) => !group.hidden && !group.open);
  for (const group of groups) group.open = open;
});
