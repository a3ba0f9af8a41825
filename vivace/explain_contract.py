"""The contract of the call that says why: model ``explain``, beside ``recommend`` and asked with the same inputs.

Its answer is one row: the items, what each scores, and a JSON object for each that says what it hangs on.
"""

from __future__ import annotations

from vivace.contract import ITEM_ID, REQUEST, SCORE, STATUS, WireTensor

EXPLAIN = "explain"
EXPLAIN_INPUTS = REQUEST
EXPLANATION = WireTensor("EXPLANATION", "BYTES", (-1,))
"""One JSON object an item: {"reasons": [{"kind", "events" or "name" and "value", "effect", "heads", "rank"}, …],
"smallest": [item id, …], "sentence": text}; see docs/explanations.md."""
EXPLAIN_OUTPUTS = (ITEM_ID, SCORE, EXPLANATION, STATUS)

LANGUAGE = "language"  # parameter of the request, text: of the sentences
LANGUAGES = ENGLISH, CHINESE = ("en", "zh")

# kinds of parts of a request
HISTORY, CONTEXT, TYPES, TIMES, COUNTERS, QUERY = ("history", "context", "types", "times", "counters", "query")
WORDS, MEANING, ATTRIBUTES = QUERY_PARTS = ("words", "meaning", "attributes")  # names of the parts of a query
