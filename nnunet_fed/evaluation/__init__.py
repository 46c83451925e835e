"""How good a segmentation is: lesions, surfaces, scores of cases, summaries, intervals."""
