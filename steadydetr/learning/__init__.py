"""How a detector learns: matching, the detection loss, class terms, teachers and what a step sees."""
