"""Grammars in Lark's and llama.cpp's notation: what they allow, by the compiler that serves them."""

import re
from collections.abc import Callable

import pytest

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Constraint
from runtime.serving.structured_output.compiler import GrammarCompiler

pytestmark = pytest.mark.anyio

VLLM_SQL = """
?start: select_statement
?select_statement: "SELECT " column_list " FROM " table_name
?column_list: column_name ("," column_name)*
?table_name: identifier
?column_name: identifier
?identifier: /[a-z][a-z0-9_]{0,3}/
"""


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= ("a"+)*', "a*"),
        ('root ::= ("a"{1,3}){1,3}', "a{1,9}"),
        ('root ::= (("a"*)?) "b"', "a*b"),
        ('root ::= x "b"\nx ::= ("a"?)+', "a*b"),
        ('root ::= ("a"{2})+ | ( "c" | "d" )+', "(aa)+|[cd]+"),
        (r'root ::= "\u0041" [\u0041-C]', "A[A-C]"),
        (r'root ::= "\U00000041\x42\n\"\\\]"', re.escape('AB\n"\\]')),
        (r"root ::= [^\x00-\U00000040B-\U0010FFFF]{2}", "AA"),
        ("root ::= [&&a~~/[^-]{3}", r"[&a~/\[^-]{3}"),
        (r"root ::= [+--\]]{3}", r"[+,\-\]]{3}"),
        ("root ::= .{2}", "(?s:.){2}"),
        ('root ::= start START fooBar foo-bar 1x\nstart ::= "a"\nSTART ::= "b"\nfooBar ::= "c"\n'
         'foo-bar ::= "d"\n1x ::= "e"', "abcde"),
        ('# start: as in Lark\n  root ::= "a" | # root\n  "b"', "[ab]"),
        (VLLM_SQL, r"SELECT [a-z]\w{0,3}(,[a-z]\w{0,3})* FROM [a-z]\w{0,3}"),
        ("!start: A\nA: /x{2}/", "xx"),
        ('start[capture="x"]: "a"', "a"),
    ],
)  # fmt: skip
async def test_answers_match_what_the_grammar_means(
    shared_compiler: GrammarCompiler, answers: Callable[..., list[str]], grammar: str, pattern: str
) -> None:
    form = await shared_compiler.compile(Constraint("grammar", grammar, "guided_grammar"))
    written = answers(form)
    assert written
    for text in written:
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("hello", r"neither a rule 'start:' \(Lark\) nor 'root ::=' \(GBNF\)"),
        ('x: "a"', "neither a rule"),
        ('x ::= "a"', "there is no rule 'root'"),
        ("root ::= other-one", "there is no rule 'other-one'"),
        (r'root ::= "\uD83D"', r"an escape that is no character: \\uD83D"),
        (r'root ::= "\q"', r"an escape that there is not: \\q"),
        ('root ::= "\\', "an escape that there is not"),
        ('root ::= "a', "does not end"),
        ("root ::= [a", "does not end"),
        ('start: x y\nx[lazy]: /.*/\ny: "b"', "llguidance, which follows it, fails on it.*in another way$"),
    ],
)
async def test_wrong_grammar_is_refused_in_words(
    shared_compiler: GrammarCompiler, grammar: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        await shared_compiler.compile(Constraint("grammar", grammar, "guided_grammar"))
