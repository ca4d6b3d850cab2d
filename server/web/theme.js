// Before anything is painted: the theme that was chosen last, else the system's.
"use strict";
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("atlas.theme");
  } catch {
    // storage is off: the system's theme
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  document.documentElement.dataset.script = "on";
}
