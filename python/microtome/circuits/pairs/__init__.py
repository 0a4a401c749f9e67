"""Clean prompts and their counterfactuals, from text and pictures to tensors.

``pair_set`` prepared pairs and their batches · ``reading`` one pair: tokens, answers, spans · ``preparation`` all
pairs, checked · ``fingerprints`` of pairs and of weights.
"""
