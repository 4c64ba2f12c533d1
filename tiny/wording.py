"""How people ask about the tiny world: many phrases for each question, names of images, small talk, typing habits.

    Ask("color", (1,)) ─► "What color is the shape in image 2?", "tell me the colour of the 2nd photo pls", …

PHRASES are for training and UNSEEN_PHRASES for the exam alone. So it can measure what the model does with words
that training never showed. Before: sources.py. Next: tiny/world.py, which knows the answers.
"""
import random
import re
from dataclasses import dataclass

ATTRIBUTES = {"size": ["small", "big"], "color": ["red", "pink", "yellow", "green", "blue", "purple"],
              "shape": ["circle", "square", "triangle", "star"],
              "place": ["left", "right", "top", "bottom", "center"]}
ABOUT_ONE, COMPARING = (*ATTRIBUTES, "describe", "is"), ("any", "which", "all", "same", "changed")
BESIDE = ("absent", "outside", "hello", "thanks", "bye")    # topics of rounds that are not about a shown image
TOPICS = (*ABOUT_ONE, *COMPARING, *BESIDE)
NO_IMAGE, NO_SUCH, OUTSIDE = "There is no image yet.", "There is no such image.", "I cannot tell."
HELLO, WELCOME, GOODBYE, NONE, NOTHING = "Hello!", "You are welcome.", "Goodbye!", "none of them", "nothing"
REFUSALS = (NO_IMAGE, NO_SUCH, OUTSIDE)


@dataclass(frozen=True)
class Ask:
    """What somebody wants to know, before it has words."""
    topic: str
    images: tuple[int, ...] = ()    # which images are meant, counted from 0
    about: str = ""                 # the value that `is`, `any` and `which` ask for, or the attribute of `same`
    again: bool = False             # the last question once more, about another image: "And image 2?"


# ---- names of images ----

NOUNS = ("image", "picture", "photo", "img", "pic")
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth".split()
NUMBERS = "one two three four five six seven eight nine".split()
LETTERS = "abcdefghi"
ENDINGS = ("st", "nd", "rd", *["th"] * 6)                   # of 1st, 2nd, …


def name_of(image: int, latest: bool, rng: random.Random) -> str:
    """A name of an image, counted from 0; half of them are like "image 2". latest: whether it was shown last.

    -1 is "image 0", which is never there.
    """
    noun, number = rng.choice(NOUNS), image + 1
    if rng.random() < .5:
        return f"image {number}"
    if not 0 <= image < len(ORDINALS):
        return f"{noun} {number}"
    if latest and rng.random() < .2:
        return rng.choice([f"the last {noun}", f"the latest {noun}", f"the newest {noun}", "the last one",
                           "the new one"])
    return rng.choice([f"{noun} {number}", f"{noun} number {number}", f"{noun} {LETTERS[image]}",
                       f"{noun}{number}", f"{noun} #{number}", f"{noun} {NUMBERS[image]}", f"number {number}",
                       f"{noun} {LETTERS[image].upper()}",
                       f"the {number}{ENDINGS[image]} {noun}", f"the {ORDINALS[image]} {noun}",
                       f"the {ORDINALS[image]} one", f"the {ORDINALS[image]}"])


# ---- phrases ----

# {name} and {other} are names of images, {it} is what {name} shows, {what} is what is looked for or compared,
# {values} are all values of the attribute in any order, such as "a star, a circle, a triangle or a square", {is},
# {one} and {several} are what is looked for in other forms, such as "at the left", "something at the left" and
# "shapes at the left", {all} and {both} are "the images", "both of them" and the like, and {thing} is something
# that is not in the tiny world.
PHRASES = {
    "size": ["What size is {it}?", "How big is {it}?", "How large is {it}?", "Is {it} big or small?",
             "Is {it} small or large?", "What is the size of {it}?", "Tell me the size of {it}.",
             "What size does {it} have?", "The size of {it}?", "{name}: what size?", "How small or big is {it}?",
             "Do you know the size of {it}?", "I want to know how big {it} is.", "What size do you see in {name}?",
             "{name}: how big is it?", "Is it a big or a small one in {name}?", "In {name}, is it small or big?",
             "Does {name} show it big or small?", "What is the size in {name}?",
             "Is it large or little that {it} is?", "Say how large {it} is.",
             "Would you say that {it} is small or big?", "What about the size of {it}?",
             "Is the one in {name} big or small?", "Of what size is {it}?", "Would you call {it} big or small?",
             "How big would you say {it} is?", "{it}: big or small?", "Name the size of {it}.", "{it} is how big?",
             "How large does {it} look?", "Is {it} large or tiny?",
             "Are we looking at a big or a small shape in {name}?", "What size did they make {it}?"],
    "color": ["What color is {it}?", "Which color is {it}?", "What is the color of {it}?",
              "Which color does {it} have?", "Tell me the color of {it}.", "In what color is {it}?",
              "{name}: what color?", "What color do you see in {name}?", "Do you see what color {it} is?",
              "I want to know what color {it} is.", "What color has {it}?", "The color in {name}?",
              "What about the color of {it}?", "Of which color is {it}?", "Say what color {it} has.",
              "In {name}, what is the color?", "Is it {values} in {name}?", "What color do you think {it} is?",
              "{it}: {values}?", "What is the color in {name}?", "Name the color of {it}.",
              "What color does {name} contain?", "Of what color is {it}?", "{it} is what color?",
              "What color is used in {name}?", "What color can you see in {name}?", "How is {it} colored?",
              "What color would you call {it}?", "Can you name the color of {it}?",
              "What color did they paint {it}?"],
    "shape": ["What shape is in {name}?", "Which shape is in {name}?", "What shape does {name} show?",
              "What is the shape in {name}?", "Tell me the shape in {name}.", "Which shape do you see in {name}?",
              "What kind of shape is in {name}?", "Give me the shape in {name}.", "{name}: which shape?",
              "Is there {values} in {name}?", "The shape of {it}?", "What is the form of {it}?",
              "What shape has {it}?", "Do you know what shape is in {name}?", "Does {name} show {values}?",
              "Is it {values} in {name}?", "In {name}, is there {values}?", "Do you see {values} in {name}?",
              "Say which shape {name} has.", "I want to know what shape {name} shows.",
              "What shape can you see in {name}?", "What about the shape in {name}?", "What is {it}: {values}?",
              "{name}: {values}?", "What form has {it}?", "Which form do you see in {name}?",
              "Is the one in {name} {values}?", "Of what shape is {it}?", "What shape is it that {name} shows?",
              "What shape is {it}?", "Which shape is {it}?", "What shape does {name} contain?",
              "What kind of shape does {name} have?", "Name the shape in {name}.", "What kind of shape is {it}?",
              "What kind is {it}?", "What sort of shape is in {name}?", "What type of shape is in {name}?",
              "What figure is in {name}?", "{it} is what shape?", "What shape do we have in {name}?",
              "What shape would you call {it}?"],
    "place": ["Where is {it}?", "Where in {name} is {it}?", "What is the place of {it}?", "Tell me where {it} is.",
              "What is the position of {it}?", "At what place is {it}?", "In what part of {name} is the shape?",
              "{name}: where is the shape?", "Give me the position of {it}.", "Which position does {it} have?",
              "Do you know where {it} is?", "I want to know where {it} is.", "Tell me the place of {it}.",
              "Say where {it} is.", "In {name}, where is it?", "Is {it} at {values}?",
              "What about the place of {it}?", "Where can you see {it}?", "Where do we find {it}?",
              "Which part of {name} shows the shape?", "Where is it in {name}?", "Is it at {values} in {name}?",
              "In which place do you find {it}?", "Where is {it} located?", "Where exactly is {it}?",
              "Where is {it} exactly?", "In which part of {name} is {it}?", "Where does {it} sit?",
              "Where does {it} lie?", "Whereabouts is {it}?", "On which side is {it}?",
              "Where in {name} do I find {it}?", "What is the location of {it}?", "{name}: what position?",
              "Where is it located in {name}?", "Can you locate {it}?", "What side is {it} on?",
              "Where has {it} been placed?", "Name the place of {it}.", "{it} is where?",
              "Where does {it} appear?"],
    "describe": ["Describe {name}.", "What do you see in {name}?", "What is in {name}?", "What does {name} show?",
                 "Tell me about {name}.", "What can you see in {name}?", "Tell me what is in {name}.",
                 "What is {name} about?", "Give me a description of {name}.", "What do we see in {name}?",
                 "Describe what you see in {name}.", "I want to know what is in {name}.",
                 "Do you know what {name} shows?", "I want to know what {name} shows.", "Say what {name} shows.",
                 "{name} shows what?", "What is there to see in {name}?", "Tell me all about {name}.",
                 "Explain {name}.", "What do you find in {name}?", "Say what is in {name}.",
                 "In {name}, what do you see?", "What is {name} of?", "Tell me more about what {name} shows.",
                 "What can we see in {name}?", "Tell me everything you see in {name}.",
                 "Describe what is in {name}.", "Describe to me what {name} shows.",
                 "What is it that you see in {name}?", "Is there something in {name}, and what is it?",
                 "What is going on in {name}?", "What is shown in {name}?", "Describe {name} in a few words.",
                 "What does {name} look like?", "What do I see in {name}?",
                 "Please look at {name} and describe it.", "Caption {name}.", "Show me what you see in {name}.",
                 "What am I looking at in {name}?", "What does {name} contain?", "What is {name} showing?",
                 "Any idea what {name} shows?", "Can you describe {name}?", "Give me the details of {name}.",
                 "Summarize {name}.", "What have we got in {name}?", "Walk me through {name}.",
                 "Describe {name} to me.", "How would you describe {name}?", "What is on {name}?",
                 "Let me know what is in {name}.", "Write a caption for {name}.", "A description of {name}?",
                 "I just added {name}, what is it?", "What does {name} depict?"],
    "is": ["Is {it} {what}?", "Do you think {it} is {what}?", "Tell me if {it} is {what}.",
           "{name}: is it {what}?", "I want to know if {it} is {what}.", "{it} is {what}, yes or no?",
           "Is it {what} in {name}?", "Say if {it} is {what}.", "In {name}, is it {what}?",
           "Is it {what} in {name}, yes or no?", "Would you say that {it} is {what}?",
           "Yes or no? {it} is {what}.", "{name}: is {it} {what}, or is it not?",
           "Can you tell me if {it} is {what}?", "Is the one in {name} {what}?", "I think {it} is {what}, is it?",
           "Do you see that {it} is {what}?", "Yes or no, {name}: is it {what}?", "Is it so that {it} is {what}?",
           "Is {it} {what} or not?", "{it}, is it {what}?", "Is {it} actually {what}?", "So {it} is {what}?",
           "{it} is {what}, right?", "{it} is {what}, correct?", "Is it true that {it} is {what}?",
           "Am I right that {it} is {what}?", "Isn't {it} {what}?", "{it} {what}?",
           "Could it be that {it} is {what}?", "Is there {one} in {name}?", "Does {name} show {one}?",
           "Does {name} have {one}?", "Does {name} contain {one}?", "Do you see {one} in {name}?",
           "Can you see {one} in {name}?", "{name}: {what}?", "Do I see {one} in {name}?", "Is {one} in {name}?",
           "Is {it} really {what}?", "Does {name} depict {one}?"],
    "any": ["Does any image show {what}?", "Is there an image with {what}?", "Is {what} in any image?",
            "Is there {what} in the images?", "Do you see {what}?", "Can you see {what} in any of the pictures?",
            "Is there any picture of {what}?", "Does one of the photos have {what}?", "Is there {what}?",
            "Do the pictures show {what}?", "Have you seen {what}?", "I want to know if there is {what}.",
            "Could you see {what} in one of them?", "Can you find {what}?", "Can we see {what} in the photos?",
            "Is there one image with {what}?", "Do you see {what} in any photo?",
            "In any of them, is there {what}?", "Has any of the images {what}?", "Does one image show {what}?",
            "Say if there is {what}.", "{what}, is there one?", "Do we see {what} or not?",
            "Tell me if you see {what}.", "Do any of them show {what}?", "Any {several}?",
            "Are there any {several}?", "Are there {several}?", "Do you see any {several}?",
            "Is any of them {is}?", "Is one of them {is}?", "Are any of them {is}?", "Is anything {is}?",
            "Is there one that is {is}?", "Can you see any {several}?", "Are there {several} in the images?",
            "Is any image {is}?", "Does any image contain {what}?", "Do any of the pics contain {what}?",
            "Anything {is}?", "Is anything here {is}?", "Is there {what} anywhere?", "Is there {what} here?",
            "Is {what} among them?", "Does {what} appear anywhere?", "Did you see {what}?", "Do we have {what}?",
            "Any {several} in there?", "Have I shown you {what}?", "Is {what} somewhere?",
            "Are there {several} somewhere?", "Does any of these have {what}?", "Did I show you any {several}?",
            "Is at least one of them {is}?", "Are any {is}?"],
    "which": ["Which image shows {what}?", "Which image has {what}?", "In which image is {what}?",
              "Which picture shows {what}?", "Which of the images shows {what}?", "Which one has {what}?",
              "What image shows {what}?", "Tell me which image shows {what}.",
              "Which photo is the one that has {what}?", "In which one is {what}?",
              "Which of the pictures is of {what}?", "{what}: which image?", "Which image do you see {what} in?",
              "In what picture is there {what}?", "Which is the photo with {what}?",
              "Do you know which image has {what}?", "I want to know which picture shows {what}.",
              "Which has {what}?", "Say which image shows {what}.", "In which of them do we find {what}?",
              "Which one is the image with {what}?", "{what} is in which image?",
              "Tell me in which image you find {what}.", "What picture do you find {what} in?",
              "Which one of the photos has {what}?", "In which photo can we see {what}?", "Which one is {is}?",
              "Which is {is}?", "Which of them is {is}?", "Which ones are {is}?", "Which images are {is}?",
              "Which images show {what}?", "Which are {is}?", "Which of the images are {several}?",
              "Which of them are {several}?", "Which pictures have {what}?", "Which image is {is}?",
              "Which images have {several}?", "In which images do you see {what}?", "Which photos show {several}?",
              "Tell me which ones are {is}.", "Which of these is {is}?", "What images show {what}?",
              "Which image contains {what}?", "Which pic has {what}?", "Which one contains {what}?",
              "Find {what}.", "Which images contain {several}?", "Point me to the image with {what}.",
              "List the images with {several}.", "Name the images that show {several}.",
              "Which ones show {several}?", "In which one do you see {what}?", "Show me the one with {what}.",
              "What images have {what}?", "Which pics show {what}?", "Name the image with {what}.",
              "Which one shows {what}?", "Which ones have {what}?", "Which one do you see {what} in?",
              "Where can I find {what}?"],
    "all": ["Describe {all}.", "What do you see in {all}?", "What is in {all}?", "Tell me about {all}.",
            "Describe each image.", "Describe every picture.", "What does each image show?",
            "Give me a description of {all}.", "I want to know what is in {all}.", "Say what is in {all}.",
            "What can you see in {all}?", "Tell me what is in {all}.", "What do we see in {all}?",
            "What do the images show?", "Say what the pictures show.", "Tell me what the photos show.",
            "Describe what you see in {all}.", "In {all}, what do you see?", "What is shown in {all}?",
            "Tell me what you see in {all}.", "What is in each of the photos?", "Do you know what is in {all}?",
            "Describe one image after the other.", "What is there to see in {all}?", "What do {all} show?",
            "Go through {all} one by one.", "What have we got in {all}?", "Describe everything.",
            "Tell me what {all} show.", "Can you describe {all}?", "What do {all} contain?", "Summarize {all}.",
            "Give me the details of {all}.", "What is on {all}?", "Describe {all} one by one.",
            "Describe them one by one."],
    "same": ["Do {name} and {other} have the same {what}?", "Is the {what} of {name} and {other} the same?",
             "Is the {what} the same in {name} and {other}?", "Do {name} and {other} share the {what}?",
             "Are {name} and {other} of the same {what}?", "Does {name} have the same {what} as {other}?",
             "{name} and {other}: same {what}?", "Is the {what} in {name} the same as in {other}?",
             "Do you see the same {what} in {name} and {other}?", "Has {name} the same {what} as {other}?",
             "In {name} and {other}, is the {what} the same?",
             "I want to know if {name} and {other} have the same {what}.",
             "Do both {name} and {other} have the same {what}?",
             "Do you think {name} and {other} have the same {what}?", "Is the {what} of {name} that of {other}?",
             "Does {name} show the same {what} as {other}?",
             "Say if the {what} of {name} and {other} is the same.",
             "Can we see the same {what} in {name} and in {other}?",
             "The {what} in {name} and {other}: is it the same?",
             "Is it one and the same {what} in {name} and in {other}?",
             "Tell me if {name} has the {what} of {other}.", "Do {name} and {other} match in {what}?",
             "Are {name} and {other} alike in {what}?", "Is the {what} identical in {name} and {other}?",
             "Does the {what} of {name} match that of {other}?", "Do {name} and {other} agree in {what}?",
             "Are {name} and {other} equal in {what}?", "Is {name} of the same {what} as {other}?",
             "Do the {what} of {name} and of {other} match?", "Does {name} match {other} in {what}?",
             "Are the {what} of {name} and {other} the same?", "Do {name} and {other} have an identical {what}?",
             "Is {name} like {other} in {what}?"],
    "changed": ["What changed from {name} to {other}?", "What is the difference between {name} and {other}?",
                "What is different in {name} and {other}?", "How do {name} and {other} differ?",
                "What differs from {name} to {other}?", "Tell me what changed from {name} to {other}.",
                "How does {name} differ from {other}?", "What is not the same in {name} and {other}?",
                "Tell me the difference between {name} and {other}.", "What changes from {name} to {other}?",
                "From {name} to {other}, what is different?", "{name} and {other}: what changed?",
                "What has changed in {other} from {name}?", "In what do {name} and {other} differ?",
                "What is it that differs in {other} from {name}?", "What has {name} that is different in {other}?",
                "Say what changed from {name} to {other}.", "What is different between {name} and {other}?",
                "I want to know what differs between {name} and {other}.",
                "Is there a difference between {name} and {other}, and what is it?",
                "{name} is not the same as {other}: what is different?",
                "What differs between {name} and {other}?", "In {name} and {other}, what is not the same?",
                "What did change between {name} and {other}?",
                "Between {name} and {other}, what is the difference?",
                "The difference between {name} and {other}?", "Compare {name} and {other}.",
                "Compare {name} with {other}.", "What sets {name} apart from {other}?",
                "List the differences between {name} and {other}.",
                "What are the differences between {name} and {other}?",
                "In what way do {name} and {other} differ?", "Spot the difference between {name} and {other}.",
                "How does {name} compare to {other}?", "How are {name} and {other} different?",
                "How is {other} unlike {name}?", "What is different about {other}, compared to {name}?",
                "In which ways do {name} and {other} differ?", "Going from {name} to {other}, what changes?",
                "What distinguishes {name} from {other}?"],
    "outside": ["Is there a {thing} in {name}?", "What color is the {thing} in {name}?", "How old is the {thing}?",
                "Where is the {thing} in {name}?", "How many of the {thing} are in {name}?", "Who made {name}?",
                "What is the name of the {thing}?", "Do you see a {thing}?", "Who are you?", "What time is it?",
                "Tell me about the {thing} in {name}.", "What is the weather in {name}?", "What is a {thing}?",
                "Does any image show a {thing}?", "Which image shows the {thing}?", "How is the weather?",
                "When was {name} made?", "Who is the {thing} in {name}?", "Tell me a story about a {thing}.",
                "Why is the {thing} in {name}?", "How much is a {thing}?", "What does the {thing} in {name} do?",
                "Can {name} be of the sea?", "Does the {thing} see {name}?", "Is the {thing} good?",
                "Can you do what a {thing} does?", "What about the {thing}?", "Say where the {thing} is.",
                "Is it the {thing} that is in {name}?", "How big is the {thing} in {name}?",
                "Do you know what a {thing} is?", "Is {name} old?", "What can you do?", "What can I ask you?",
                "How many images are there?", "How many pictures do you see?", "How many shapes are there?",
                "Help.", "What is your name?", "Do you like {thing}?", "Tell me a joke.", "Are you a {thing}?",
                "What is the capital of {thing}?", "Can you write a {thing}?", "What is two plus two?",
                "Who is {thing}?", "How do I make a {thing}?", "Do you speak {thing}?", "How does it work?",
                "What day is it today?", "Do you have a {thing}?", "I like {thing}.", "Where do you live?",
                "What does {thing} mean?", "Is there a {thing}?", "Does it have a {thing}?", "Sing me a {thing}.",
                "Which of them is a {thing}?", "What do you think of {thing}?", "Can I eat the {thing}?",
                "Is it {thing}?", "Why?", "Are there any {thing} in {name}?", "Do you want a {thing}?",
                "What is the weather like today?", "Where was {name} taken?", "Who took {name}?",
                "What is the {thing} of {name}?", "How much does {name} cost?", "What music do you like?",
                "Can you draw a {thing}?", "Who won the game?", "What is five times six?", "Are you alive?",
                "Are you a robot?", "How old are you?", "What is your favorite {thing}?",
                "What is the meaning of life?", "Translate this.", "Is {name} beautiful?", "Is {name} real?",
                "What is {it} made of?", "How heavy is {it}?", "Does it move?", "Is there somebody in {name}?",
                "Are there people in {name}?", "What is behind {it}?", "What is the background of {name}?",
                "Who painted {name}?", "Can you help me with my {thing}?", "Tell me something about yourself.",
                "Is it raining?", "Which team won?", "When is dinner?", "What language do you speak?",
                "How tall is the {thing}?", "Open the {thing}.", "Play some {thing}.", "Give me a {thing}.",
                "Buy me a {thing}.", "Is {it} made of {thing}?", "Is it heavy?", "Whose {thing} is it?",
                "Could you send me a {thing}?", "What does it smell like?", "Who is the president of {thing}?",
                "Do you love me?", "How do you feel today?", "Do you dream?", "Where is {thing}?",
                "Write me a poem about {thing}.", "Recommend a {thing}.", "What should I cook today?",
                "Is {thing} better than {thing}?"],
    "hello": ["Hello.", "Hi!", "Hey.", "Good morning.", "Hello, how are you?", "Hi there.", "Good day.",
              "Hello again.", "Hey there.", "Good evening!", "How are you?", "Hi, how do you do?",
              "Good afternoon.", "Yo!", "Hiya!", "Howdy!", "Greetings.", "Hello friend!", "Hi again!",
              "Hey, good morning!", "Hello computer.", "Evening.", "Morning!", "Nice to meet you.",
              "Hi, I am new here.", "Hey hey.", "What's up?", "Sup?", "Hello, model.", "Hi friend.",
              "Hello, nice to see you.", "Hello hello.", "Hey you.", "Hi bot.", "Anybody there?",
              "Good to see you.", "Hi, how are you today?"],
    "thanks": ["Thanks.", "Thank you.", "Thanks a lot.", "Great, thanks!", "Ok, thank you.", "Very good.", "Nice!",
               "Thank you, that was good.", "Ok.", "Great, thank you very much.", "Thx.", "Cool!",
               "That is right.", "Perfect!", "Awesome!", "Wow!", "Good job.", "Well done!", "Cheers.", "Got it.",
               "I see.", "You are great!", "You are right.", "That was helpful.", "That helps, thanks!",
               "Nice one!", "Brilliant.", "Amazing!", "Correct!", "Right, thank you.", "Lovely, thanks.",
               "You are very good at this!", "Cool, thank you so much.", "Good work!", "Thanks for the help!",
               "Many thanks!", "Thank you for your help.", "Impressive!", "You are smart!", "Fine, thanks.",
               "Splendid.", "Ta.", "Ty.", "Good bot.", "Excellent!", "Fantastic!", "Super.", "Much appreciated.",
               "I appreciate it.", "Good answer.", "Good.", "Fine.", "Thank you kindly.", "Nice work.", "Ok cool.",
               "Okay.", "Alright.", "Very helpful.", "Wonderful!", "Sweet!", "Neat.", "Exactly!",
               "That is correct.", "True.", "Not bad!", "Spot on.", "Beautiful.", "Good to know.", "Understood.",
               "Makes sense.", "Ok got it.", "Thanks mate.", "Thank you, friend.", "Much obliged.", "Ah, I see.",
               "Oh nice.", "Yes, that is right.", "Great job!", "You did well.", "Love it!", "Well seen.",
               "Right.", "Clever!", "Good bot, thanks.", "Thanks, you are the best."],
    "bye": ["Bye.", "Goodbye!", "Bye bye.", "See you.", "Good night.", "That is all.", "See you again!",
            "Bye, and thanks.", "Ok, that is all, thanks.", "See ya!", "See you later!", "Have a good day!",
            "Take care!", "Later!", "I have to go now.", "Have a nice day, bye!", "Bye for now.", "Cya!",
            "Talk to you soon!", "I am done, goodbye.", "Have a good evening!", "Farewell!", "K, bye.", "So long!",
            "Ciao!", "Gotta go.", "Goodbye then.", "I am off now.", "Until next time.", "Have a great day!",
            "See you tomorrow.", "Good bye.", "I have to leave.", "Signing off.", "Catch you later.", "Cheerio!",
            "Night!", "That will be all.", "See you soon.", "Bye now.", "Alright, bye.", "Ok, see you.",
            "I am leaving, bye.", "Have fun!", "Bye, take care.", "Ok thanks, bye.", "That is it for today.",
            "Adieu!"],
    "again": ["And {name}?", "And in {name}?", "What about {name}?", "And what about {name}?", "How about {name}?",
              "{name}?", "In {name}?", "And {name}, too?", "The same for {name}?", "Now {name}.",
              "Same for {name}?", "Same question for {name}.", "And now {name}?",
              "And what about the one in {name}?", "What about in {name}?", "And the one in {name}?"],
}
UNSEEN_PHRASES = {
    "size": ["Which size does {it} have?", "Give me the size of {it}.", "Do you know how large {it} is?",
             "Is it big or small in {name}?", "Tell me how big {it} is.", "In what size is {it}?"],
    "color": ["What color does {it} have?", "Give me the color of {it}.", "Do you know the color of {it}?",
              "The color of {it}?", "Tell me what color you see in {name}.", "{name}: which color?"],
    "shape": ["What shape do you see in {name}?",
              "Is the shape in {name} a circle, a star, a square or a triangle?",
              "Tell me what shape {name} shows.", "What form does {it} have?", "{name}: what shape?",
              "I want to know the shape in {name}."],
    "place": ["Where do you see {it}?", "At which place is {it}?", "What position does {it} have?",
              "Give me the place of {it}.", "Do you know the position of {it}?", "{name}: which place?"],
    "describe": ["Give me a description of what is in {name}.", "Do you know what is in {name}?",
                 "Tell me what you see in {name}.", "What is there in {name}?", "Tell me what {name} shows."],
    "is": ["Can you see if {it} is {what}?", "Do you know if {it} is {what}?", "Yes or no: is {it} {what}?",
           "Is {it} {what}, yes or no?"],
    "any": ["Does any of the images show {what}?", "Is there any image that has {what}?",
            "Does any photo have {what}?", "Can you see {what}?", "Is {what} in one of the pictures?",
            "Do you know if there is {what}?"],
    "which": ["Which of them shows {what}?", "In which of the pictures is {what}?", "Which photo has {what}?",
              "In which image do you see {what}?", "Tell me which picture has {what}.",
              "Which is the image of {what}?"],
    "all": ["Describe to me what is in {all}.", "What do you find in {all}?", "Can you see what is in {all}?",
            "Tell me all about {all}.", "What does every image show?"],
    "same": ["Do {name} and {other} show the same {what}?", "Have {name} and {other} the same {what}?",
             "Is the {what} in {name} and {other} the same?", "Is it the same {what} in {name} and {other}?",
             "Tell me if {name} and {other} have the same {what}."],
    "changed": ["What differs in {name} and {other}?", "How is {name} different from {other}?",
                "What is the difference from {name} to {other}?", "Tell me how {name} and {other} differ.",
                "Between {name} and {other}, what changed?"],
    "outside": ["What does the {thing} think?", "Is the {thing} in {name} old?", "How far is the {thing}?",
                "Can you see the {thing} in {name}?", "What can a {thing} do?", "Is {name} from the city?"],
    "hello": ["Hello there!", "Hi, good morning.", "Hey, how are you?"],
    "thanks": ["Ok, thanks a lot!", "Very good, thank you.", "Great."],
    "bye": ["Ok, bye!", "Goodbye, see you.", "Good night, and thanks."],
    "again": ["And for {name}?", "And what of {name}?", "The same about {name}?"],
}
# What an image shows. What is said most stands twice.
IT = ("the shape in {name}", "the shape in {name}", "{name}", "the object in {name}", "the thing in {name}",
      "the figure in {name}", "the one in {name}")
# Names of an image that was just shown alone.
LATEST = ("the image", "the image", "the picture", "the photo", "this image", "this picture", "the img", "this",
          "this one", "the pic", "this photo")
# Questions about what was talked about last that name nothing. Likewise about both images, where two were shown so
# far, and about all images, while nobody talks about a single one.
NAMELESS = {"size": ("What size?", "How big?", "And the size?", "Size?", "Big or small?", "How large?"),
            "color": ("What color?", "And the color?", "Color?", "Which color?", "What color exactly?"),
            "shape": ("What shape?", "And the shape?", "Shape?", "Which shape?", "What kind of shape?"),
            "place": ("Where?", "And the place?", "Position?", "Place?", "And where?", "Location?",
                      "Where exactly?", "Which side?"),
            "describe": ("What do you see?", "What is it?", "What is this?", "Describe what you see.",
                         "Describe it.", "Describe this.", "What am I looking at?", "What is it of?", "Describe."),
            "is": ("{what}?", "Is it {what}?", "{what}, right?", "And {what}?"),
            "all": ("What do you see?", "What is this?", "What are these?", "Describe what you see.",
                    "What can you see?", "What is there?", "Describe."),
            "same": ("Do {both} have the same {what}?", "Do they have the same {what}?", "Same {what}?",
                     "Is the {what} the same in {both}?", "Are {both} of the same {what}?",
                     "Are they of the same {what}?", "Do {both} share the {what}?", "Is the {what} the same?",
                     "Do they match in {what}?", "Do {both} match in {what}?", "Is the {what} identical?",
                     "Are they alike in {what}?"),
            "changed": ("What changed?", "What is the difference?", "What is different?", "How do they differ?",
                        "How do {both} differ?", "What is the difference between {both}?", "What has changed?",
                        "What differs?", "What is not the same in {both}?", "Tell me the difference.",
                        "Compare {both}.", "Compare them.", "Any difference?", "Spot the difference.",
                        "What are the differences?", "How are they different?")}
ALL = ("the images", "the images", "the pictures", "the photos", "all images", "all the images", "all of them",
       "them", "all", "the pics", "these images", "all pictures", "each of them", "all photos", "these")
ALL_THREE = ("all three", "the three images", "all three of them", "all three pictures", "the three photos")
BOTH = ("both images", "both pictures", "both of them", "the two images", "the two photos", "the two",
        "both", "both photos")
# What was shown last, alone, or talked about last.
SHORT_IT = ("it", "it", "it", "the shape", "the object", "this thing", "that")
# A value in a phrase of `any` and `which`, words for it, and how it stands in a phrase of `is`.
LOOKED_FOR = {"size": ("a {} shape", "a {} object", "something {}"),
              "color": ("a {} shape", "a {} object", "something {}"), "shape": ("a {}", "a {}", "one {}"),
              "place": ("a shape at the {}", "something at the {}", "a shape on the {}")}
OTHERWISE = {"big": ("big", "large"), "small": ("small", "little", "tiny"),
             "center": ("center", "middle", "centre")}
IS = {"size": ("{}",), "color": ("{}",), "shape": ("a {}",), "place": ("at the {}", "on the {}", "in the {}")}
SEVERAL = {"size": ("{} shapes", "{} ones", "{} objects"), "color": ("{} shapes", "{} ones", "{} objects"),
           "shape": ("{}s",), "place": ("shapes at the {}", "objects on the {}")}
COMPARED = {"size": ("size",), "color": ("color",), "shape": ("shape", "shape", "form"),
            "place": ("place", "place", "position", "spot", "location")}
LISTED = {"size": "{}", "color": "{}", "shape": "a {}", "place": "the {}"}      # as part of {values}
# What is not in the tiny world.
THINGS = ("dog cat person man woman child car house tree table chair boat bird flower book ball hat door "
          "bridge street train bottle").split()
UNSEEN_THINGS = "horse bicycle cup king river computer window apple teacher airplane".split()
# What polite people put before a question and behind it.
BEFORE = ("Please", "Can you tell me", "Could you tell me", "Please tell me", "Hi,", "Hello,", "So", "And", "Now",
          "Ok,", "Great,", "Thanks,", "I want to know:", "Next:", "Tell me:", "Would you please say", "Thank you,",
          "Then", "But", "Well,", "Ok, now", "My next question:", "Let me ask you:", "Hey,", "Yes, and",
          "Hello there,", "Pls", "Plz tell me", "Alright,", "Okay,", "Hm,", "Right,", "Oh,", "Wait,", "Also,",
          "Sorry,", "Excuse me,", "Good,", "Cool,", "Perfect,", "Nice,", "Kindly tell me", "Quick question:",
          "One more question:", "I wonder:", "I was wondering:", "May I ask:", "I would like to know:",
          "Here is another one.", "I just added one.", "Look.", "Can you say", "Can u tell me", "Remind me:",
          "Just curious:", "Question:", "Yes.", "No.", "Be so kind and tell me")
UNSEEN_BEFORE = ("Could you please tell me", "Hello, can you tell me", "Now please tell me", "Thanks, and now",
                 "I want you to tell me:", "Hi there,")
AFTER = (" please", ", please", " thanks", " for me", ", thank you", " pls", " plz", ", thx", " then", " now",
         ", my friend", ", exactly", " here")


# In remarks that people make before a question, between words that no list could hold.
FILLERS = "I it the to and here my was so this that now is a for you me one of".split()


def made_up(rng: random.Random) -> str:
    """A word that stands for all that no list could name."""
    return "".join(rng.choice("abcdefghijklmnoprstuvw") for _ in range(rng.randint(3, 8)))


def remark(rng: random.Random) -> str:
    """One to six words about anything, such as "Oops I tulfa to kerb.": nothing that the answer depends on."""
    words = [rng.choice(FILLERS) if rng.random() < .5 else made_up(rng) for _ in range(rng.randint(0, 5))]
    text = " ".join([*words, made_up(rng)])
    return text[0].upper() + text[1:] + rng.choice([".", ".", "!", ",", ""])


def listed(parts: list[str], word: str = "and") -> str:
    """Such as "the size, the color and the place"; nothing for no parts."""
    return f" {word} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# ---- from an Ask to what somebody types ----

@dataclass(frozen=True)
class Wording:
    """How somebody types."""
    unseen: bool = False        # in phrases that training never sees
    lower: bool = False         # always in lower case and without the final mark, otherwise now and then
    plain: bool = False         # always in the first phrase, with capitals and marks

    def question(self, ask: Ask, names: list[str], short: bool, rng: random.Random) -> str:
        """A question as it is typed; names: of the images meant; short: it is clear without them, too."""
        return self.typed(self.words(ask, names, short, rng), ask.topic in ("hello", "thanks", "bye"), rng)

    def value(self, forms: dict[str, tuple[str, ...]], about: str, rng: random.Random) -> str:
        """What is asked for in one of these forms, which each attribute has; or the attribute itself."""
        pick = (lambda options: options[0]) if self.plain else rng.choice
        for attribute, values in ATTRIBUTES.items():
            if about == attribute:
                return pick(forms[attribute])
            if about in values:
                return pick(forms[attribute]).format(pick(OTHERWISE.get(about, (about,))))
        return about

    def words(self, ask: Ask, names: list[str], short: bool, rng: random.Random) -> str:
        """A phrase for it, with capital and mark."""
        pick = (lambda options: options[0]) if self.plain else rng.choice
        phrase = pick((UNSEEN_PHRASES if self.unseen else PHRASES)["again" if ask.again else ask.topic])
        name, other = (*names, "", "")[:2]
        if "{name} and {other}" in phrase and not self.plain and rng.random() < .2:
            numbers = " and ".join(str(image + 1) for image in ask.images)
            noun = rng.choice(["", "images ", "pictures ", "photos "])
            phrase = phrase.replace("{name} and {other}", noun + numbers)
        it = pick([one for one in IT if (ask.topic != "shape" or "shape" not in one)
                   and (ask.topic != "place" or one != "{name}")])
        if short and not ask.again and not self.plain and rng.random() < .4:
            if ask.topic in NAMELESS and not self.unseen and rng.random() < (.3 if ask.topic in ABOUT_ONE else 1):
                phrase = rng.choice(NAMELESS[ask.topic])
            elif "{it}" in phrase and "{name}" not in phrase:
                it = rng.choice(SHORT_IT if ask.topic != "shape" else ("it", "it", "the object"))
        what = {"is": IS, "same": COMPARED}.get(ask.topic, LOOKED_FOR)
        what, is_, one, several = (self.value(forms, ask.about, rng) for forms in (what, IS, LOOKED_FOR, SEVERAL))
        values = [LISTED[ask.topic].format(value) for value in ATTRIBUTES.get(ask.topic, ())]
        rng.shuffle(values)
        thing = rng.choice(UNSEEN_THINGS if self.unseen else THINGS)
        if not self.unseen and rng.random() < .3:           # an unknown word, so that no list has to name them all
            thing = made_up(rng)
        text = phrase.format(name=name, other=other, it=it.format(name=name), what=what, thing=thing,
                             all=pick(ALL + {2: BOTH, 3: ALL_THREE}.get(len(names), ())), both=pick(BOTH), one=one,
                             several=several, values=listed(values, "or"), **{"is": is_})
        return text[0].upper() + text[1:]

    def typed(self, text: str, is_talk: bool, rng: random.Random) -> str:
        """The phrase as this person types it. Now and then, by chance, it is in lower case, lacks the mark, has
        British spelling or "whats" and "u" for "what is" and "you", is polite, which small talk is already, or
        has unknown words with it: a remark before a question, a name after small talk."""
        if self.plain:
            return text
        before, often = (UNSEEN_BEFORE, .5) if self.unseen else (BEFORE, .25)
        if not is_talk and rng.random() < often:
            text = rng.choice(before) + " " + text[0].lower() + text[1:]
        if not is_talk and rng.random() < .1 and text[-1] in "?.":
            text = text[:-1] + rng.choice(AFTER) + text[-1]
        if rng.random() < .1:
            text = f"{text[:-1]} {made_up(rng)}{text[-1]}" if is_talk else f"{remark(rng)} {text}"
        if rng.random() < .3:
            text = text.replace("color", "colour")
        if rng.random() < .2:
            text = re.sub(r"\b([Ww]hat|[Ww]here|[Hh]ow|[Ww]ho|[Tt]hat) is\b", rng.choice([r"\1's", r"\1s"]), text)
        if rng.random() < .05:
            text = re.sub(r"\byou\b", "u", text)
        if self.lower or rng.random() < .3:
            text = text.lower()
        if self.lower or rng.random() < .25:
            text = text.rstrip("?.!")
        return text
