"""One file an adversary: clients, pages of other sites, readers that do not read, authors of grammars."""
