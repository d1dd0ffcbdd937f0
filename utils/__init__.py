"""What training needs, a room for each question.

arguments    which flags do all scripts share?
data_loader  where do images come from, who is in which split, what is a batch?
losses       what is minimised?
training     how does a training go?
teacher      which network teaches, and where is it?
methods      which methods are there, and which values may they take?
study        who trains what, and when is a study done?
tracking     who else is told how a study goes?
checkpoint   what is on disk?
inference    what does a network say of a split?
evaluate     how good and how sure?
gaussians    where is the truth known?
replicas     how are many small networks trained at once?
synthetic    what does the study with a known truth measure?
smoothing_curves  how much should be smoothed, given what the teacher says?
comparison   which differences mean something, and did anything leak?
tables       how are the results of many runs read side by side?
plots        what do they look like?
report       what is sent to a colleague?
inspector    what does each method ask of one image?
errors       what is said of bad input?
"""
