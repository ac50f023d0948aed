"""Grammars in Lark's notation, and in llama.cpp's (GBNF), which is translated to it.

llguidance has a translator; what it loses is kept here: a group around one repetition, escapes, what means
more in a class of Lark's, and rules whose names Lark's notation has not. Runs in the process that may be
killed. Does not know requests. Start at `to_lark`.
"""

import itertools
import json
import re

from llguidance.gbnf_to_lark import (
    ASTNode,
    GrammarParser,
    LiteralNode,
    Position,
    RegexNode,
    RepetitionNode,
    resolve,
)

GBNF_RULE = re.compile(r"^\s*[\w-]+[ \t]*::=", re.MULTILINE)
LARK_START = re.compile(r"^\s*(?:%llguidance\b|[?!]*start\b[^:\n]*:)", re.MULTILINE)
ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([nrt\"\\\[\]]))")
PLAIN = {"n": "\n", "r": "\r", "t": "\t"}
LARK_NAME = re.compile(r"[a-z][a-z0-9_]*")


def to_lark(grammar: str) -> str:
    """Return a grammar in Lark's notation; ValueError where it is in neither."""
    if not GBNF_RULE.search(grammar):
        if LARK_START.search(grammar):
            return grammar
        raise ValueError("it has neither a rule 'start:' (Lark) nor 'root ::=' (GBNF)")
    parser = GbnfParser()
    rules = parser.parse(grammar)
    for name, renamed in {**parser.renamed, "root": "root"}.items():
        if renamed not in rules:
            raise ValueError(f"there is no rule '{name}'")
    resolve(rules)
    ordered = sorted(rules.values(), key=lambda rule: rule.order)
    return "\n".join(["%llguidance {}", *map(str, ordered)])


class Repetition(RepetitionNode):
    """A repetition that keeps its parentheses where it is repeated itself."""

    def is_atomic(self) -> bool:
        """Return whether it can be repeated as it is."""
        return False


class GbnfParser(GrammarParser):
    """llguidance's parser, with its nodes written in a way that Lark's notation takes."""

    def __init__(self) -> None:
        super().__init__()
        self.renamed: dict[str, str] = {}
        """The names of rules, and what they are in Lark."""
        self._taken = {"root"}

    def _parse_name(self, pos: Position) -> tuple[str, Position]:  # type: ignore[override]
        name, after = GrammarParser._parse_name(pos)
        if name not in self.renamed:
            self.renamed[name] = name if name == "root" else self._lark_name(name)
            self._taken.add(self.renamed[name])
        return self.renamed[name], after

    def _lark_name(self, name: str) -> str:
        """Return a name that no other rule has, and that is not Lark's own."""
        plain = re.sub(r"[^a-z0-9_]", "_", name.lower())
        if not LARK_NAME.fullmatch(plain) or plain == "start":
            plain = f"r_{plain}"
        numbered = (f"{plain}_{number}" for number in itertools.count(2))
        return next(each for each in itertools.chain([plain], numbered) if each not in self._taken)

    def _parse_literal(self, pos: Position) -> tuple[ASTNode, Position]:
        text, pos = "", pos.advance()
        while True:
            ends = pos.current() == '"'
            character, pos = self._parse_char(pos)
            if ends:
                return LiteralNode(json.dumps(text, ensure_ascii=False)[1:-1]), pos
            text += character

    def _parse_char_class(self, pos: Position) -> tuple[ASTNode, Position]:
        pos = pos.advance()
        written = "["
        if pos.current() == "^":
            written, pos = "[^", pos.advance()
        while pos.current() != "]":
            first, pos = self._parse_char(pos)
            written += rf"\x{{{ord(first):X}}}"
            if pos.current() == "-" and pos.peek(2) != "-]":
                last, pos = self._parse_char(pos.advance())
                written += rf"-\x{{{ord(last):X}}}"
        return RegexNode(written + "]"), pos.advance()

    def _parse_char(self, pos: Position) -> tuple[str, Position]:
        """Return a character, an escaped one decoded."""
        if pos.current() != "\\":
            if not pos.current():
                raise ValueError(f"a text or class does not end, at {pos}")
            return pos.current(), pos.advance()
        found = ESCAPE.match(pos.text, pos.pos)
        if found is None:
            raise ValueError(f"an escape that there is not: {pos.peek(2)}, at {pos}")
        *points, plain = found.groups()
        if plain is not None:
            return PLAIN.get(plain, plain), pos.advance(2)
        number = int(next(point for point in points if point), 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise ValueError(f"an escape that is no character: {found[0]}, at {pos}")
        return chr(number), pos.advance(len(found[0]))

    def _parse_repetition(self, pos: Position, nodes: list[ASTNode]) -> Position:
        if nodes and isinstance(nodes[-1], RegexNode) and nodes[-1].rx == ".":
            nodes[-1] = RegexNode("(?s:.)")  # a line feed, too
        pos = super()._parse_repetition(pos, nodes)
        if nodes and isinstance(made := nodes[-1], RepetitionNode):
            nodes[-1] = Repetition(made.node, made.min_times, made.max_times)
        return pos
