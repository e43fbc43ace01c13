"""What a constituent is: preprocessing, model, optimiser, schedule; and how it answers.

Nothing in here opens a file of the store or knows of other shards.
"""
