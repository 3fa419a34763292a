"""Evaluation of dense retrieval in one or many languages: mAP in three settings, rank distance, language bias.

The pieces, in the order in which data flow through them: `tasks` (questions, candidates, which belong together),
`ranks` (exact ranks by counting), `metrics` (mAP and rank distance), `search` (FAISS top-k, language bias at the top),
`run` (encoder + task -> results), `report` (JSON, Markdown, heat map).
"""
