"""Evaluation of dense retrieval in one or many languages: mAP in three settings, rank distance, nDCG, language bias.

The pieces, in the order in which data flow through them: `lareqa`, `beir`, `reranking`, `jsonl` (data sets, which make
`tasks`: questions, candidates, which belong together), `cache` (vectors kept on disk), `ranks` (exact ranks by
counting), `search` (top k), `metrics` and `bias` (measures of every query and their means), `run` (encoder + task ->
results), `results` and `report` (JSON, Markdown, pictures), `queries` (all measures by query, for `compare`). Beside
them stand `bitext` (translations) and `mteb_adapter`.
"""
