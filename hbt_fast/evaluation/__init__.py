"""Evaluation of dense retrieval in one or many languages: mAP in three settings, rank distance, nDCG, language bias.

The pieces, in the order in which data flow through them: `lareqa`, `beir` (of `layouts` and `judged`), `reranking`,
`jsonl` (data sets, which make `tasks`: questions, candidates, which belong together; `load` knows them by name),
`cache` (vectors kept on disk), `ranks` (exact ranks by `counting`), `search` (top k by `indexes`, over `shards` of what
is larger than memory), `metrics` and `bias` (measures of every query and their means), `run` (encoder + task ->
results), `results`, `report` and `maps` (JSON, Markdown, pictures), `queries` (all measures by query, for `compare`).
Beside them stand `bitext` (translations), `mteb_adapter` and `mteb_tasks`.
"""
