// Before and after: one slider for all pictures, which can also be dragged.
{
  const slider = document.getElementById("at");
  const boxes = document.querySelectorAll(".compare");
  const show = () => {
    for (const box of boxes) {
      box.style.setProperty("--at", `${100 - slider.value}%`);
      box.querySelector(".left").hidden = slider.value > 97;
      box.querySelector(".right").hidden = slider.value < 3;
    }
  };
  const drag = event => {
    if (!event.buttons) return;
    const { left, width } = event.currentTarget.getBoundingClientRect();
    slider.value = 100 - 100 * (event.clientX - left) / width;
    show();
    event.preventDefault();
  };
  document.documentElement.classList.add("scripted");
  slider.addEventListener("input", show);
  for (const box of boxes) {
    box.addEventListener("pointerdown", drag);
    box.addEventListener("pointermove", drag);
    box.addEventListener("dragstart", event => event.preventDefault());
  }
  show();
}
