// The talk as one column, or as two side by side: each scrolls by itself below its model's name.

import {$, button, element, visible} from "./dom.js";
import {Card} from "./answers.js";
import {answerOf, authorOf} from "./requests.js";

const NEAR_END = 80;  // pixels

function question(turn, edit) {
  const text = element("div.mine", visible(turn.question));
  text.dir = "auto";
  return element("div.asked", "", text, button("Edit", edit, "Change this message and go on from here"));
}

// A message as a form, in its place; `send(text)` gets the new one.
export function editor(place, text, send) {
  const area = element("textarea"), close = () => made.replaceWith(place);
  const made = element("form.editor", "", area, element("div.acts", "", button("Cancel", close), element("button.strong", "Send")));
  area.value = text;
  area.rows = Math.min(10, text.split("\n").length + 1);
  area.setAttribute("aria-label", "Message");
  made.addEventListener("submit", event => {
    event.preventDefault();
    if (area.value.trim()) send(area.value.trim());
  });
  area.addEventListener("keydown", event => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); made.requestSubmit(); }
  });
  place.replaceWith(made);
  area.focus();
}

export class Column {
  // side: "left" or "right"; acts: {edit(index, place), regenerate(model), answerWith(model)}
  constructor(side, acts) {
    this.select = $(side);
    this.box = $(`column-${side}`);
    this.turns = this.box.querySelector(".turns");
    this.acts = acts;
  }

  get model() { return this.select.value; }

  toEnd() { this.turns.scrollTop = this.turns.scrollHeight; }

  // Draws, and stays at the end if the end was in sight.
  drawn = draw => {
    const {turns} = this, low = turns.scrollHeight - turns.scrollTop - turns.clientHeight < NEAR_END;
    draw();
    if (low) this.toEnd();
  };

  // Shows a chat, whose last turn `models` are answering now.
  show(chat, models = []) {
    this.last = null;
    this.turns.replaceChildren();
    this.turns.setAttribute("aria-label", `Conversation with ${this.model}`);
    chat.turns.forEach((_, index) => this.#add(chat, index, models));
    this.toEnd();
  }

  // Shows the turn that was added to a chat.
  extend(chat, models) {
    this.last?.finish(false);
    this.#add(chat, chat.turns.length - 1, models);
    this.toEnd();
  }

  #add(chat, index, models) {
    const turn = chat.turns[index], {model} = this, last = index === chat.turns.length - 1;
    const place = element("div.turn"), answer = answerOf(turn, model);
    if (turn.question !== null) {
      const asked = question(turn, () => this.acts.edit(index, asked));
      place.append(asked);
    }
    this.turns.append(place);
    if (!answer) return;
    const author = authorOf(turn, model);
    const card = this.last = new Card(answer, {author, own: author === model}, {
      regenerate: () => this.acts.regenerate(model), answerWith: () => this.acts.answerWith(model), drawn: this.drawn,
    });
    place.append(card.box);
    if (last && models.includes(model)) card.draw(true, false);
    else card.finish(last);
  }
}
