"""One forward of a model: run from merged embeddings, listened to, overwritten, left as found. Knows no pairs.

``decoder`` runs on merged embeddings · ``nodes`` heads and neurons, seen and replaced · ``attention`` queries, keys
and values, seen and replaced · ``wiring`` who reads and writes the residual stream · ``directions`` of it ·
``restore`` what a run changes.
"""
