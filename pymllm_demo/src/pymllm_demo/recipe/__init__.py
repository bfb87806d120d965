"""How the demo model was made: data, tokenizer, training, evaluation. Needs torch; serves nothing."""
