"""The Metis-RISE pipeline: pass rates, the SFT set that they lead to, and all stages in one go.

The only part of training that also calls the converter; everything else of training knows nothing of it.
"""
