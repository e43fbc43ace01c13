"""Pure arithmetic about a training: how many epochs a stage gets, what a deletion costs."""
