"""What training needs, a room for each question.

arguments    which flags do all scripts share?
data_loader  where do images come from, who is in which split, what is a batch?
losses       what is minimised?
training     how does a training go?
teacher      which network teaches, and where is it?
checkpoint   what is on disk?
inference    what does a network say of a split?
evaluate     how good and how sure?
tables       how are the results of many runs read side by side?
errors       what is said of bad input?
"""
