"""From the text of an answer to its parts: reasoning, content and tool calls.

Knows how families of models spell these; does not know HTTP, tokenizers or engines. Start at parts.py, then
`AnswerParser` in parser.py; formats.py has the table of formats by vLLM's names of their parsers.
"""
