// Runs before the first paint (a classic script in the head), so that a remembered theme never flashes the other one.
(() => {
  let choice = "";
  try {
    choice = JSON.parse(localStorage.getItem("moltbot.theme") || '""');
  } catch {
    choice = ""; // storage is blocked or damaged: follow the system
  }
  if (choice === "light" || choice === "dark") document.documentElement.dataset.theme = choice;
})();
