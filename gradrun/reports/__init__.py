"""Results to text, for people or programs. Knows results and units; never what made them."""
