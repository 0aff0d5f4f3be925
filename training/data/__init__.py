"""Rows of data sets: read, checked, tokenized, padded or packed, and put into batches.

    file --rows--> mappings --records--> Record --check--> DataReport
    Record --encode--> Example --collate--> a padded batch, or (packing) several queries in one row
    lengths --batching--> which rows make a batch

Importing this package imports neither torch nor transformers.
"""
