"""How the vision tower of each family runs over a sequence that goes on behind the patches; one file per family."""
